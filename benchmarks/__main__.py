"""All benchmarks, then the report: `make bench`."""

from __future__ import annotations

import subprocess
import sys

from .report import ROOT

NAMES = ("engine", "rows", "unused", "http", "backends", "kv", "quantisation")


def main() -> int:
    """Run each benchmark in a process of its own; the exit code of the first that fails."""
    folder = ROOT / "build" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json" for name in NAMES]
    commands = [[f"benchmarks.{name}", "--json", str(file)] for name, file in zip(NAMES, files)]
    commands.append(["benchmarks.report", *map(str, files)])
    for command in commands:
        print(f"== {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
