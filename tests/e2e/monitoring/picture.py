#!/usr/bin/env python3
"""Pictures of the Grafana boards with live data: docs/images/dashboard-*.png.

Draws each board from its own JSON with what a Prometheus answers; Grafana itself is not needed. Without --prometheus it
starts a Ray cluster of two nodes with the sample on it and a Prometheus, and loads it for some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from rich.console import Console

from xloom_dashboards.boards import BOARDS
from xloom_dashboards.expressions import substituted

from .adapters import write_adapter
from .drawing.page import WIDTH, height_of, page
from .drawing.series import Json, Span
from .prometheus import ROOT, program
from .traffic import ADDED, MODELS, Load, adapters_come_and_go, refused_requests
from .watched import SMALL, Watched, watched

IMAGES = ROOT / "docs" / "images"
COLOURS = 192  # of a picture: a palette keeps it small
STEPS = 180  # points of a line
PICTURE_SCRAPE_S = 5  # as often as Ray reports a node; its exporter forgets gauges after twice its period
RATE_S = 4 * PICTURE_SCRAPE_S  # the window of rates, as Grafana takes it
SHOT_TIMEOUT_S = 120
console = Console(stderr=True)


@dataclass(frozen=True)
class Source:
    """A Prometheus, and the time to draw."""

    url: str
    span: Span

    def ask(self, expression: str) -> list[Json]:
        """An expression's series, with everything chosen in its variables."""
        values = {
            "__rate_interval": f"{RATE_S}s",
            "__interval": f"{RATE_S}s",
            "__range": f"{max(60, int(self.span.end - self.span.start))}s",
        }
        asked: dict[str, Any] = {"query": substituted(expression, values)}
        asked |= {"start": self.span.start, "end": self.span.end, "step": self.span.step}
        answer = httpx.post(f"{self.url}/api/v1/query_range", data=asked, timeout=60, trust_env=False).json()
        if answer["status"] != "success":
            raise RuntimeError(f"{answer['error']}: {asked['query']}")
        found: list[Json] = answer["data"]["result"]
        return found


def draw(source: Source, folder: Path, browser: str) -> Iterator[Path]:
    """One picture for each board."""
    folder.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        written = board.json()
        name = board.uid.removeprefix("xloom-")
        file = folder / f"dashboard-{name}.png"
        with tempfile.TemporaryDirectory() as scratch:
            drawn = Path(scratch) / "board.html"
            drawn.write_text(page(written, source.ask, source.span), encoding="utf-8")
            shot = Path(scratch) / "board.png"
            photograph(browser, drawn, shot, height_of(written))
            with Image.open(shot) as picture:
                picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)
        yield file


def photograph(browser: str, drawn: Path, shot: Path, height: int) -> None:
    """A page as a PNG, by a browser without a window and with a profile that is thrown away."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    own = [f"--user-data-dir={drawn.parent / 'profile'}", f"--window-size={WIDTH},{height}", f"--screenshot={shot}"]
    subprocess.run([*command, *own, drawn.as_uri()], capture_output=True, timeout=SHOT_TIMEOUT_S, check=True)


def past_of(url: str, start: float, end: float) -> Source:
    """That time of a Prometheus, as so many points."""
    step = max(PICTURE_SCRAPE_S, round((end - start) / STEPS))
    return Source(url, Span(start // step * step, end // step * step, step))


def keep_busy(made: Watched, added: Path, minutes: float) -> None:
    """A day in minutes: calm, a rush that brings a second replica, text of one domain after the other, calm."""
    part = minutes * 60 / 8
    with Load(made.endpoint, lanes=3, length=160, pause_s=0.5):
        adapters_come_and_go(made.endpoint, added)
        time.sleep(part)
    with Load(made.endpoint, lanes=12, length=500):
        refused_requests(made.endpoint)
        made.wait_replicas(2)
        time.sleep(part)
    for domain in ("code", "docs", "json", "maths"):
        models = ("blend", "blend", *MODELS)
        with Load(made.endpoint, lanes=6, length=250, models=models, domains=[domain], pause_s=0.2):
            refused_requests(made.endpoint)
            time.sleep(part)
    with Load(made.endpoint, lanes=2, length=150):
        made.wait_replicas(1)
    with Load(made.endpoint, lanes=3, length=160, pause_s=0.5):
        adapters_come_and_go(made.endpoint, added)
        time.sleep(part)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.e2e.monitoring.picture",
        description=__doc__,
        epilog="example: python -m tests.e2e.monitoring.picture --prometheus http://127.0.0.1:9090 --minutes 60",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="FOLDER", help="(docs/images)")
    parser.add_argument("--prometheus", metavar="URL", help="draw from this one, and start nothing")
    parser.add_argument("--minutes", type=float, default=4, help="of load, or of the past to draw (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="after drawing, keep the cluster until Ctrl-C")
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        console.print("There is no chromium: apt-get install chromium", style="red")
        return 2
    with contextlib.ExitStack() as ending:
        if options.prometheus:
            source = past_of(options.prometheus, time.time() - 60 * options.minutes, time.time())
        else:
            program("prometheus")  # before anything starts
            status = ending.enter_context(console.status("Starting a cluster"))
            folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
            made = ending.enter_context(
                watched(folder, SMALL, scrape_s=PICTURE_SCRAPE_S, export_ms=1000 * PICTURE_SCRAPE_S)
            )
            status.update("Loading it")
            started = time.time()
            keep_busy(made, write_adapter(folder / ADDED, 8), options.minutes)
            status.update("Drawing")
            source = past_of(made.prometheus.url, started, time.time())
        for file in draw(source, options.out, browser):
            console.print(f"{file}: {file.stat().st_size // 1024} KiB", highlight=False)
        if options.keep and not options.prometheus:
            console.print(f"Prometheus: {source.url}. Ctrl-C ends it.", highlight=False)
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
