"""A real Prometheus, configured as docs/monitoring.md says, and what it answers."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from cluster.local_cluster import free_port
from tests.programs import needs

from ..served import wait_until

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "monitoring.md"
RULES = ROOT / "dashboards" / "alerts.yaml"
SCRAPE_S = 2  # between two scrapes; the page's configuration has the usual 15 s
START_S = 60.0
STOP_S = 20.0

PROMETHEUS = needs("prometheus", "promtool", package="prometheus")

Series = dict[str, Any]  # "metric": labels, "values": [[time, text], ...]


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`."""
    path = shutil.which(name)
    assert path is not None, f"{name} is not installed: apt-get install prometheus (it has promtool too)"
    return path


def promtool(*arguments: Any) -> str:
    """What promtool says; fails with it when it finds fault."""
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def configuration(discovery: Path, router: str, rules: Path | None, scrape_s: int = SCRAPE_S) -> dict[str, Any]:
    """The page's prometheus.yml, for this cluster: its discovery file and its router's host and port."""
    blocks = re.findall(r"```yaml\n# prometheus\.yml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1, f"one prometheus.yml in {PAGE}"
    written: dict[str, Any] = yaml.safe_load(blocks[0])
    ray, routers = written["scrape_configs"]
    ray["file_sd_configs"][0] |= {"files": [str(discovery)], "refresh_interval": "1s"}
    routers["static_configs"][0]["targets"] = [router]
    written["global"] = {"scrape_interval": f"{scrape_s}s", "evaluation_interval": f"{scrape_s}s"}
    written["rule_files"] = [str(rules)] if rules is not None else []
    return written


class Prometheus:
    """Runs in a `with` block. Times are seconds since the epoch."""

    def __init__(self, folder: Path, configured: dict[str, Any]) -> None:
        self._folder = folder
        self._file = folder / "prometheus.yml"
        self._file.write_text(yaml.safe_dump(configured), encoding="utf-8")
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        promtool("check", "config", self._file)
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={self._file}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                    "--log.level=warn",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._is_ready, START_S, "Prometheus", 0.2)
        except BaseException:
            print((self._folder / "prometheus.log").read_text(encoding="utf-8"))
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "Prometheus has ended"
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _stop(self) -> None:
        self._http.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def get(self, route: str, **parameters: Any) -> Any:
        """The data of an answer of its HTTP API; fails with its error."""
        answer = (
            self._http.post(f"/api/v1/{route}", data=parameters) if parameters else self._http.get(f"/api/v1/{route}")
        )
        body = answer.json()
        assert body["status"] == "success", f"{body.get('error')}: {parameters}"
        return body["data"]

    def between(self, expression: str, start: float, end: float, step: float = SCRAPE_S) -> list[Series]:
        """An expression's series over a time that have a number in it."""
        data = self.get("query_range", query=expression, start=start, end=end, step=step)
        return [series for series in data["result"] if any(map(is_number, series["values"]))]

    def selects(self, selector: str, start: float, end: float) -> bool:
        """Whether a selector has had any series over a time."""
        return bool(self.get("series", **{"match[]": selector, "start": start, "end": end}))

    def targets(self) -> dict[str, str]:
        """The health of each scraped address: up, down or unknown."""
        return {each["scrapeUrl"]: each["health"] for each in self.get("targets")["activeTargets"]}

    def rules(self) -> list[dict[str, Any]]:
        """All rules it evaluates."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]


def is_number(point: list[Any]) -> bool:
    """Whether a point is more than the NaN of nothing divided by nothing."""
    return not math.isnan(float(point[1]))
