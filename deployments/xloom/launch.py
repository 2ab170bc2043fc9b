"""`xloom serve`: Ray on this machine, or the cluster named, with the application on it until Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
import uuid
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from xloom.adapters.manifest import Entry
from xloom.app import APP_NAME, NAMESPACE, ROUTER_CPUS, Placing, build, for_stored, lora_rank, open_adapters
from xloom.observability.logs import serve_logging
from xloom.preflight import refuse
from xloom.processes import end_marked
from xloom.protocol import XloomError
from xloom.router.exposure import is_loopback
from xloom.router.port_claim import check_free
from xloom.settings import Settings, forget_keys
from xloom.stages import Stages
from xloom.start import start

if TYPE_CHECKING:
    from xloom.adapters.client import StoreClient

STOP_TIMEOUT_S = 15.0
EXIT_TIMEOUT_S = 3.0
START_ATTEMPTS = 3
RUN_MARK = "XLOOM_RUN"  # in the environment of all that a local cluster starts

console = Console(stderr=True)


class Cluster:
    """Ray as this process needs it: the cluster it was pointed at, or one of its own that ends with it."""

    def __init__(self, settings: Settings) -> None:
        self.is_local = not os.environ.get("RAY_ADDRESS")
        self._folder: Path | None = None
        self._run = uuid.uuid4().hex
        cores = os.cpu_count() or 1
        wanted = settings.replicas.cpus
        # Serve never starts a replica that asks for more than the machine has.
        self.placing = Placing(min(wanted, cores) if self.is_local else wanted, self.is_local)
        # Ray counts whole CPUs; the router's share comes on top, so that a machine of two cores serves.
        needed = settings.replicas.max * self.placing.replica_cpus + settings.router.replicas * ROUTER_CPUS
        self._cpus = max(cores, math.ceil(needed))

    def start(self) -> None:
        """Connect, starting a local cluster unless RAY_ADDRESS names one."""
        # Ray's ports answer the whole network, and who reaches them runs code here: a token, known to this process
        # and its children alone (Ray's own default would leave one in the home folder). On a cluster that someone
        # else runs, its own mode holds.
        if self.is_local and "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        if self.is_local:
            os.environ[RUN_MARK] = self._run
        # An actor without GPUs keeps its view of the machine: the router's vLLM must recognise the platform.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray runs its workers at nice 15, and the engines with them: any other process would starve them. The name is
        # Ray 2.60's `ray._private.ray_constants.RAY_WORKER_NICENESS`, read by the raylet.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Serve's controller wakes ten times a second by default (ray/serve/_private/constants.py, 2.60), which an idle
        # two-core machine notices; scaling decisions come from figures of a second at best.
        os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "1000")
        import ray

        options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
        if self.is_local:
            self._folder = Path(tempfile.mkdtemp(prefix="xloom-", dir="/tmp"))  # sockets need a short path
            options |= {
                "num_cpus": self._cpus,
                "include_dashboard": False,
                "_temp_dir": str(self._folder),
                "_node_ip_address": "127.0.0.1",
            }
        for attempt in range(START_ATTEMPTS):
            try:
                ray.init(**options)
                return
            except Exception as error:  # Ray raises the bare class when its node is not up within 30 s
                self._end_processes()
                if attempt + 1 == START_ATTEMPTS or not self.is_local:
                    where = "here" if self.is_local else f"at {os.environ['RAY_ADDRESS']}"
                    cure = "See that the machine has memory and CPU to spare, and try again."
                    raise XloomError(
                        "ray_not_started", f"Ray could not be reached {where}: {error}", cure, 503
                    ) from None

    def stop(self, store: StoreClient | None) -> None:
        """End what was started: the application, and with a local cluster the store and the cluster."""
        import ray
        from ray import serve

        if not ray.is_initialized():
            self._end_processes()
            self._sweep()
            return
        if not self.is_local:
            serve.delete(APP_NAME)  # the store stays: it is the cluster's
            ray.shutdown()
            return
        # Actors now die because they are told to: not news. Relied on: listen_error_messages, Ray 2.60.
        ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None
        # Serve lets requests finish for as long as the drain timeout allows; whoever pressed Ctrl-C waits less.
        ending = threading.Thread(target=serve.shutdown, daemon=True)
        ending.start()
        ending.join(STOP_TIMEOUT_S)
        if store is not None:
            store.stop()
        self._end_processes()
        self._sweep()

    def _end_processes(self) -> None:
        """Ray's own shutdown, then what it leaves: orphaned agents and engines notice only after a while."""
        import ray

        ray.shutdown()
        if not self.is_local:
            return
        end_marked(RUN_MARK, self._run, grace_s=EXIT_TIMEOUT_S, timeout_s=EXIT_TIMEOUT_S)

    def _sweep(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def with_own_folder(settings: Settings, folder: Path) -> Settings:
    """Settings by which what lies below the folder `xloom serve` was started in may be added at run time.

    For an endpoint of this machine alone, unless `store.sources` says otherwise.
    """
    store = settings.store
    if "sources" in store.model_fields_set or not is_loopback(settings.router.host) or folder == Path(folder.root):
        return settings
    wider = store.model_copy(update={"sources": [*store.sources, str(folder)]})
    return settings.model_copy(update={"store": wider})


def serve_forever(settings: Settings) -> None:
    """Serve until interrupted, then stop all that was started. Raises `XloomError`."""
    cluster, store = Cluster(settings), None
    if cluster.is_local:
        settings = with_own_folder(settings, Path.cwd())
    with Stages(console) as stages:
        stages.begin("Checking settings")
        refuse(settings)
        if cluster.is_local and settings.router.port:
            check_free(settings.router.host, settings.router.port)  # a router finds it out after the engine's start
    forget_keys()  # the settings have them; Ray's processes would inherit them
    stop = threading.Event()
    previous = {
        each: signal.signal(each, lambda number, frame: _interrupt(stop, frame))
        for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with Stages(console) as stages:
            stages.begin("Starting Ray")
            cluster.start()
            stages.begin("Preparing adapters")
            store, entries = asyncio.run(open_adapters(settings))
            settings = for_stored(settings, entries)
            port = _deploy(settings, store, entries, cluster, stages, stop)
        if not stop.is_set():
            _greet(settings, entries, port)
            stop.wait()
    except _Interrupted:
        pass
    finally:
        stop.set()
        for each in previous:
            signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it running
        with console.status("Stopping"):
            cluster.stop(store)
        for each, handler in previous.items():
            signal.signal(each, handler)


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM, during the start."""


def _interrupt(stop: threading.Event, frame: FrameType | None) -> None:
    if not stop.is_set():
        stop.set()
        raise _Interrupted


def _deploy(
    settings: Settings,
    store: StoreClient,
    entries: tuple[Entry, ...],
    cluster: Cluster,
    stages: Stages,
    stop: threading.Event,
) -> int:
    """Start the application and wait until it can answer; returns the port it listens on."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: the terminal is ours
    # No proxies: the router listens itself (see router/deployment.py).
    logging_config = serve_logging(settings.observability.logs) | {"log_level": "WARNING"}
    serve.start(proxy_location="Disabled", logging_config=logging_config)
    application = build(settings, store, lora_rank(settings, entries), cluster.placing)
    stages.begin(f"Starting router and engines, {settings.model.source}")
    return start(
        application,
        settings,
        waiting=lambda seconds: stages.still(),
        is_stopped=stop.is_set,
    )


def _greet(settings: Settings, entries: tuple[Entry, ...], port: int) -> None:
    host = "127.0.0.1" if settings.router.host in ("0.0.0.0", "::", "localhost") else settings.router.host
    url = f"http://{host}:{port}"
    bundles = [entry.name for entry in entries if entry.ref.is_mixture]
    names = [settings.model.served_name, *(entry.name for entry in entries)]
    model = bundles[0] if bundles else names[-1]
    key = settings.router.api_key is not None
    header = ' \\\n  -H "Authorization: Bearer $XLOOM_API_KEY"' if key else ""
    client_key = 'os.environ["XLOOM_API_KEY"]' if key else '"none"'
    out = Console()
    out.print(
        f"\nServing [bold]{', '.join(names)}[/bold] at [bold]{url}/v1[/bold]. Ctrl-C ends it.\n",
        highlight=False,
        soft_wrap=True,
    )
    if settings.router.console:
        out.print(
            f"To try them and see what mixtures do: [bold]{url}/console[/bold]\n", highlight=False, soft_wrap=True
        )
    out.print(
        f"curl {url}/v1/chat/completions{header} \\\n  -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 64}}\'\n',
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    out.print(
        f"{'import os' + chr(10) if key else ''}from openai import OpenAI\n"
        f'client = OpenAI(base_url="{url}/v1", api_key={client_key})\n'
        f'messages = [{{"role": "user", "content": "Hello"}}]\n'
        f'for chunk in client.chat.completions.create(model="{model}", messages=messages, stream=True):\n'
        f'    print(chunk.choices[0].delta.content or "", end="", flush=True)\n',
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
