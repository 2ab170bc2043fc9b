"""The connection between a router and a replica alone: xloom's frames over TCP, and the same messages over gRPC.

Two processes; one sends engine steps as a replica does, the other decodes them as a router does. Each case runs with
the cores free, and with every core kept computing, as an engine on a CPU keeps it.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import uvloop

from xloom.protocol import ReplicaFrame, Step, TokenChunk
from xloom.wire.channel import Channel, Transport
from xloom.wire.frames import FrameReader, pack
from xloom.wire.tcp import TCP

from .machine import machine, machine_line
from .peers.grpc_stream import GRPC
from .tables import Table, markdown

TRANSPORTS: dict[str, Transport] = {"TCP": TCP, "gRPC": GRPC}
LIMIT = 1 << 24  # bytes
CONTEXT = multiprocessing.get_context("spawn")


class Case(msgspec.Struct, frozen=True):
    """So many steps of so many chunks, one every `period` seconds; 0: when it is asked for."""

    name: str
    steps: int
    chunks: int
    period: float


WARM_UP = Case("warm-up", 100, 1, 0.0)
CASES = (
    Case("there and back, 1 chunk", 1000, 1, 0.0),
    Case("one way, a step of 1 chunk every 4 ms", 500, 1, 0.004),
    Case("one way, a step of 64 chunks every 10 ms", 300, 64, 0.010),
)


@dataclass(frozen=True)
class Found:
    """Microseconds: on the way, and of processor time a step at either end."""

    median: float
    slow: float  # the 90th percentile
    router: float
    replica: float


def _step(case: Case) -> Step:
    chunks = [TokenChunk(f"request-{number:08d}", [1000 + number]) for number in range(case.chunks)]
    chunks[0].stop_reason = time.monotonic_ns()  # one clock for all processes of a machine
    return Step(chunks)


async def _replica(channel: Channel) -> None:
    """Does what it is asked for, case by case, and says what processor time that took."""
    while (asked := await channel.receive(LIMIT)) is not None:
        case = msgspec.msgpack.decode(asked, type=Case)
        started = time.process_time()
        for _ in range(case.steps):
            if case.period:
                await asyncio.sleep(case.period)
            else:
                await channel.receive(LIMIT)
            channel.send(pack(_step(case)))
        await asyncio.sleep(0.1)  # what is queued is sent, by whatever thread
        channel.send(pack(Step([TokenChunk("end", [], "stop", repr(time.process_time() - started))])))


async def _router(channel: Channel, case: Case) -> Found:
    reader: FrameReader[ReplicaFrame] = FrameReader(channel, ReplicaFrame, LIMIT)
    started = time.process_time()
    channel.send(msgspec.msgpack.encode(case))
    taken: list[float] = []
    for _ in range(case.steps):
        sent = time.monotonic_ns()
        if not case.period:
            channel.send(b"next")
        step = await reader.read()
        assert isinstance(step, Step)
        sent = step.chunks[0].stop_reason if case.period else sent  # type: ignore[assignment]
        taken.append((time.monotonic_ns() - sent) / 1000)
    spent = time.process_time() - started
    end = await reader.read()
    assert isinstance(end, Step)
    taken.sort()
    each = 1e6 / case.steps
    replica = float(str(end.chunks[0].stop_reason))
    return Found(statistics.median(taken), taken[len(taken) * 9 // 10], spent * each, replica * each)


def _serve(name: str, pipe: Connection) -> None:
    async def serve() -> None:
        listening = await TRANSPORTS[name].listen("127.0.0.1", _replica)
        pipe.send(listening.address)
        await asyncio.to_thread(pipe.recv)

    uvloop.run(serve())
    os._exit(0)


def _ask(name: str, pipe: Connection) -> None:
    async def ask() -> list[Found]:
        channel = await TRANSPORTS[name].connect(*pipe.recv())
        await _router(channel, WARM_UP)
        return [await _router(channel, case) for case in CASES]

    pipe.send(uvloop.run(ask()))
    os._exit(0)


def run(name: str) -> list[Found]:
    """All cases over one connection between two new processes."""
    (near, far), (client_near, client_far) = CONTEXT.Pipe(), CONTEXT.Pipe()
    replica = CONTEXT.Process(target=_serve, args=(name, far))
    router = CONTEXT.Process(target=_ask, args=(name, client_far))
    replica.start()
    router.start()
    client_near.send(near.recv())
    found: list[Found] = client_near.recv()
    near.send(None)
    router.join()
    replica.join()
    return found


def _compute() -> None:
    while True:
        pass


@contextmanager
def computing(processes: int) -> Iterator[None]:
    """Processes that never wait."""
    started = [CONTEXT.Process(target=_compute, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.join()


def table(title: str, found: dict[str, list[list[Found]]], rounds: int) -> Table:
    """Medians over the rounds."""
    rows: list[list[Any]] = []
    for number, case in enumerate(CASES):
        for name, runs in found.items():
            samples = [each[number] for each in runs]
            values = [[getattr(sample, field) for sample in samples] for field in Found.__dataclass_fields__]
            rows.append([f"{case.name}, {name}", *(f"{statistics.median(value):,.0f}" for value in values)])
    columns = ["case", "median", "90th percentile", "processor time, router", "processor time, replica"]
    return {"title": title, "columns": columns, "rows": rows, "notes": f"Medians of {rounds} alternating rounds."}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.link", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (%(default)s)")
    rounds = parser.parse_args().rounds
    print(machine_line(machine()))
    for title, busy in (("cores free", 0), ("every core computing", os.cpu_count() or 1)):
        found: dict[str, list[list[Found]]] = {name: [] for name in TRANSPORTS}
        with computing(busy):
            for number in range(rounds):
                for name in list(TRANSPORTS)[:: 1 if number % 2 == 0 else -1]:
                    found[name].append(run(name))
        print(f"\n{markdown(table(f'One connection, {title} (µs a step)', found, rounds))}", flush=True)


if __name__ == "__main__":
    main()
