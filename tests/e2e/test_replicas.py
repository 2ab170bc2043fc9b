"""Replicas come and go behind two routers: scaling on real signals, the loss of one under load, Ctrl-C amid it all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from xloom.settings import ReplicaSettings

from ..models import ADAPTERS, tiny_adapter, tiny_bundle
from .served import ADMIN_KEY, API_KEY, STOP_S, TOKENS, Served, wait_until
from .weights import Weights, settings_for

pytestmark = [pytest.mark.slow]

PROMPT = list(range(30, 70))
KINDS = ["blend", "base", "alpha", "single"]
SCALE_UP_S = 240.0  # an engine's start on a busy machine
SCALE_DOWN_S = 90.0
WORKERS = 12
STREAMS = 6  # as many as one replica takes at once: none waits for another to end
LONG = 800  # tokens
STUCK_S = ReplicaSettings().stuck_timeout_s
SILENT_S = 60.0  # beyond that, of a stream: a starved watchdog counts only the time in which it ran itself


@pytest.fixture(scope="module")
def server(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One replica that may become two; a queue of more than one request asks for the second."""
    # In one pass each token's gates are made of what the last ones did: with random adapters at full strength float32
    # and float64 part after some 60 tokens, in plain torch as well. At half of it they agree to the end.
    folder = tmp_path_factory.mktemp("weights")
    gentle = tiny_bundle(folder / "gentle", weights.base, seed=3, depth=2, global_scaling_weight=0.5)
    settings = settings_for(
        weights,
        xlora=[
            {"name": "blend", "source": str(weights.bundle)},
            {"name": "single", "source": str(gentle), "routing_passes": 1},
        ],
        engine={"max_num_seqs": STREAMS},
        replicas={
            "min": 1,
            "max": 2,
            "target_queue_depth": 1,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 10,
            "drain_timeout_s": 20,
        },
        router={"replicas": 2, "api_key": API_KEY, "admin_key": ADMIN_KEY},
    )
    served = Served(tmp_path_factory.mktemp("scaled"), settings)
    served.wait_ready()
    yield served
    served.stop()


def replicas(server: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.status()["replicas"]
    return [replica for replica in found if replica["state"] == "ready"]


@contextmanager
def load(server: Served) -> Iterator[None]:
    """More requests than one replica takes at a time; every one must be answered."""
    done = threading.Event()

    def ask(number: int) -> int:
        answered = 0
        while not done.is_set():
            assert len(server.greedy(KINDS[number % len(KINDS)], PROMPT, 64)) == 64
            answered += 1
        return answered

    with ThreadPoolExecutor(WORKERS) as pool:
        asking = [pool.submit(ask, number) for number in range(WORKERS)]
        try:
            yield
        finally:
            done.set()
        assert all(each.result(120) for each in asking)


def scale_up(server: Served) -> None:
    wait_until(lambda: len(replicas(server)) == 2, SCALE_UP_S, "two replicas", 0.25)


def test_two_routers_share_the_port_and_what_is_served(server: Served, weights: Weights, tmp_path: Path) -> None:
    def ask(route: str) -> dict[str, Any]:
        """Over a connection of its own, which the kernel gives to one of the two."""
        answer = httpx.get(f"{server.url}{route}", headers={"Authorization": f"Bearer {API_KEY}"}, trust_env=False)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    wait_until(lambda: len({ask("/xloom/status")["router"]["id"] for _ in range(20)}) == 2, 60, "two routers")
    adapter = tiny_adapter(tmp_path / "gamma", weights.base, seed=21, **ADAPTERS[2])
    assert server.load("gamma", adapter).status_code == 200

    def everywhere(served: bool) -> bool:
        lists = [{model["id"] for model in ask("/v1/models")["data"]} for _ in range(20)]
        return all(("gamma" in names) is served for names in lists)

    wait_until(lambda: everywhere(True), 10, "gamma known to both routers")
    assert server.unload("gamma").status_code == 200
    wait_until(lambda: everywhere(False), 10, "gamma forgotten by both routers")


def test_a_queue_brings_a_second_replica_and_calm_takes_it_away(server: Served) -> None:
    assert len(replicas(server)) == 1
    first = {name: server.greedy(name, PROMPT, 32) for name in KINDS}
    with load(server):
        scale_up(server)
        both = {replica["id"] for replica in replicas(server)}
        # The new one holds every adapter, and takes its share.
        wait_until(lambda: all(each["stats"]["running"] for each in replicas(server)), 60, "both at work")
        assert all(len(replica["stats"]["adapters"]) == 4 for replica in replicas(server))
        assert {name: server.greedy(name, PROMPT, 32) for name in KINDS} == first
    wait_until(lambda: len(server.status()["replicas"]) == 1, SCALE_DOWN_S, "one replica", 0.25)
    assert replicas(server)[0]["id"] in both
    assert {name: server.greedy(name, PROMPT, 32) for name in KINDS} == first


def kill_replica(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop_engine_core(pid: int) -> None:
    core = next(each for each in psutil.Process(pid).children(recursive=True) if is_engine_core(each))
    core.suspend()  # SIGSTOP: it is there, and holds its connections, and does nothing


def is_engine_core(process: psutil.Process) -> bool:
    return "EngineCore" in " ".join(process.cmdline())


@pytest.fixture(scope="module")
def expected(server: Served) -> dict[str, list[int]]:
    return {name: server.greedy(name, PROMPT, LONG) for name in KINDS}


@pytest.mark.parametrize(("strike", "silence_s"), [(kill_replica, SILENT_S), (stop_engine_core, STUCK_S + SILENT_S)])
def test_streams_of_a_lost_replica_go_on_unbroken(
    server: Served, expected: dict[str, list[int]], strike: Callable[[int], None], silence_s: float
) -> None:
    with load(server):
        scale_up(server)
    received = dict.fromkeys(range(STREAMS), 0)
    silences = dict.fromkeys(range(STREAMS), 0.0)  # each stream's longest, in seconds
    asked: Any = {"prompt": PROMPT, "max_tokens": LONG, "temperature": 0}
    asked["extra_body"] = TOKENS | {"return_mixture": "tokens"}
    undisturbed = (server.openai.completions.create(model="blend", **asked).choices[0].model_extra or {})["mixture"]
    told: dict[int, dict[str, Any]] = {}

    def stream(number: int) -> tuple[list[int], str | None]:
        tokens: list[int] = []
        finish = None
        with server.openai.completions.create(model=KINDS[number % len(KINDS)], stream=True, **asked) as chunks:
            last = time.monotonic()
            for chunk in chunks:
                for choice in chunk.choices:
                    tokens += (choice.model_extra or {}).get("token_ids") or []
                    finish = choice.finish_reason or finish
                    if "mixture" in (choice.model_extra or {}):
                        told[number] = (choice.model_extra or {})["mixture"]
                received[number] = len(tokens)
                now = time.monotonic()
                silences[number], last = max(silences[number], now - last), now
        return tokens, finish

    def all_run() -> bool:
        return all(received.values()) and all(each["stats"]["running"] for each in replicas(server))

    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(stream, number) for number in range(STREAMS)]
        wait_until(all_run, 60, "streams on both replicas")
        victim = replicas(server)[0]
        strike(victim["pid"])
        at_strike = list(received.values())
        answers = [each.result(180) for each in streams]

    assert 0 < min(at_strike) <= max(at_strike) < LONG
    assert answers == [(expected[KINDS[number % len(KINDS)]], "length") for number in range(STREAMS)]
    assert max(silences.values()) < silence_s
    assert {KINDS[number % len(KINDS)] for number in told} == {"blend", "single"}
    for number, mixture in told.items():  # of tokens that either replica gave
        assert mixture["tokens"] == len(mixture["token_gates"]) == LONG
        if KINDS[number % len(KINDS)] == "blend":
            pairs = zip(mixture["token_gates"], undisturbed["token_gates"], strict=True)
            assert all(gates == pytest.approx(expected, abs=1e-3) for gates, expected in pairs)
    wait_until(lambda: victim["id"] not in {each["id"] for each in server.status()["replicas"]}, 60, "it is given up")


def test_ctrl_c_amid_a_stream_ends_everything_in_time(server: Served) -> None:
    with (
        httpx.Client(base_url=f"{server.url}/v1", timeout=60, trust_env=False) as client,
        client.stream(
            "POST",
            "/completions",
            headers={"Authorization": f"Bearer {API_KEY}"},
            json={"model": "blend", "prompt": PROMPT, "max_tokens": 1900, "stream": True, "ignore_eos": True},
        ) as answer,
    ):
        lines = answer.iter_lines()  # held: an iterator that is dropped closes the stream
        next(lines)
        assert server.stop() < STOP_S


def test_once_stopped_the_client_is_told(server: Served) -> None:
    server.stop()
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()
