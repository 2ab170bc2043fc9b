"""vLLM's own `vllm bench serve`, run many times in one process: its imports take longer than its runs.

Relies on vLLM 0.32: `vllm.benchmarks.serve.add_cli_args` and `main`, which the `vllm bench serve` command calls.
Run as a module it is the process: a command line in JSON per line of stdin, a line on stdout when it is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil


@dataclass(frozen=True)
class Load:
    """One measured run: so many requests, so many of them at a time, so long; tokens."""

    concurrent: int
    requests: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Run:
    """What the client saw; milliseconds."""

    throughput: float  # output tokens a second
    ttft: float  # median
    ttft_mean: float
    tpot: float  # median time per output token after the first
    itl_p99: float
    output_tokens: int
    seconds: float


class ClientError(RuntimeError):
    """The client failed, or some of its requests did."""


class Client:
    """The client's process."""

    def __init__(self, model: Path, served_name: str, folder: Path) -> None:
        self._model, self._served_name, self._folder = model, served_name, folder
        self._count = 0

    def __enter__(self) -> Client:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_PLUGINS": "",
            "TQDM_DISABLE": "1",
        }
        self._log = (self._folder / "client.txt").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.client"], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._process_figures = psutil.Process(self._process.pid)
        self._expect_line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def cpu_seconds(self) -> float:
        """User and system time of the client so far."""
        times = self._process_figures.cpu_times()
        return float(times.user + times.system)

    def run(self, port: int, load: Load, seed: int) -> Run:
        """Put a load on a server; prompts depend on the seed alone. Raises `ClientError`."""
        self._count += 1
        file = self._folder / f"run-{self._count}.json"
        options = [
            "--backend", "openai", "--host", "127.0.0.1", "--port", str(port), "--endpoint", "/v1/completions",
            "--model", self._served_name, "--tokenizer", str(self._model),
            "--dataset-name", "random", "--random-input-len", str(load.input_tokens),
            "--random-output-len", str(load.output_tokens), "--num-prompts", str(load.requests),
            "--max-concurrency", str(load.concurrent), "--seed", str(seed), "--ignore-eos", "--temperature", "0",
            "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99", "--disable-tqdm",
            "--save-result", "--result-dir", str(file.parent), "--result-filename", file.name,
        ]  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(options).encode() + b"\n")
        self._process.stdin.flush()
        self._expect_line()
        found = json.loads(file.read_text(encoding="utf-8"))
        wanted = load.requests * load.output_tokens
        if found["failed"] or found["completed"] != load.requests or found["total_output_tokens"] != wanted:
            made = found["total_output_tokens"]
            raise ClientError(f"{found['failed']} of {load.requests} requests failed; {made} of {wanted} tokens came")
        return Run(
            throughput=found["output_throughput"],
            ttft=found["median_ttft_ms"],
            ttft_mean=found["mean_ttft_ms"],
            tpot=found["median_tpot_ms"],
            itl_p99=found["p99_itl_ms"],
            output_tokens=found["total_output_tokens"],
            seconds=found["duration"],
        )

    def _expect_line(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode().strip()
        if line != "done":
            log = Path(self._log.name).read_text(encoding="utf-8", errors="replace")
            raise ClientError(f"{line or 'the client ended'}\n{log[-2000:]}")


def serve() -> None:
    """Run each command line that comes."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    answers = sys.stdout
    print("done", file=answers, flush=True)
    for line in sys.stdin:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                main(parser.parse_args(json.loads(line)))
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), file=answers, flush=True)
        else:
            print("done", file=answers, flush=True)


if __name__ == "__main__":
    serve()
