#!/usr/bin/env python3
"""Make a virtual environment and install xloom with its pinned requirements. Standard library only.

A second run with nothing changed does nothing, in well under a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("core", "edge", "cpu", "mistralrs", "isq", "dev", "bench")
BASES = ("core", "edge", "cpu")  # each stands alone; the others come on top of one, of cpu unless said otherwise
SUBSETS = ("core", "edge")  # files of names: the pins are those of cpu.lock
OVERLAYS = {"isq": Path("share/xloom/isq")}  # folders inside the environment that it does not import from by itself
SUPPORTED = ((3, 11), (3, 13))  # oldest and newest Python
BOOTSTRAP = ("pip", "setuptools")  # first: an older pip lacks the dry-run report used below
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "xloom-install.json"
TAIL = 25  # lines of pip's output shown on failure


class InstallError(Exception):
    """What went wrong, and what to do."""


def say(text: str) -> None:
    """Print one line of progress at once."""
    print(text, flush=True)


def lock_file(extra: str) -> Path:
    """The file that says what an extra brings."""
    return ROOT / "requirements" / f"{extra}.{'names' if extra in SUBSETS else 'lock'}"


def pins(extra: str) -> dict[str, str]:
    """Each requirement line of an extra, by lower-case name."""
    lines = (line.split("#")[0].strip() for line in lock_file(extra).read_text(encoding="utf-8").splitlines())
    wanted = [line for line in lines if line]
    if extra in SUBSETS:
        cpu = pins("cpu")
        return {name.lower(): cpu[name.lower()] for name in wanted}
    return {line.split("==")[0].lower(): line for line in wanted}


def digest(extra: str) -> str:
    """A hash of all that decides what an extra installs."""
    content = hashlib.sha256()
    for line in sorted(pins(extra).values()):
        content.update(f"{line}\n".encode())
    content.update((ROOT / "pyproject.toml").read_bytes())
    content.update(str(ROOT).encode())
    return content.hexdigest()


def read_stamp(venv: Path) -> dict[str, str]:
    """The hash of each extra installed in the environment."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def supported(version: tuple[int, int]) -> bool:
    """Whether xloom runs on this version of Python."""
    return SUPPORTED[0] <= version <= SUPPORTED[1]


def find_python() -> str:
    """A supported interpreter: this one, or a newer or older one on the path."""
    if supported(sys.version_info[:2]):
        return sys.executable
    for minor in range(SUPPORTED[0][1], SUPPORTED[1][1] + 1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    raise InstallError(
        f"xloom needs Python 3.{SUPPORTED[0][1]} to 3.{SUPPORTED[1][1]}; this is {platform.python_version()}. "
        "Install one, or name it: make install PYTHON=/path/to/python3.11"
    )


def venv_python(venv: Path) -> Path:
    """The environment's interpreter."""
    return venv / "bin" / "python"


def make_venv(venv: Path) -> None:
    """Create the environment unless it is there and works."""
    python = venv_python(venv)
    works = [str(python), "-m", "pip", "--version"]
    if python.exists() and subprocess.run(works, capture_output=True).returncode == 0:
        return
    say(f"Making the virtual environment {venv}")
    made = subprocess.run([find_python(), "-m", "venv", "--clear", str(venv)], capture_output=True, text=True)
    if made.returncode != 0:
        raise InstallError(
            f"The virtual environment could not be made:\n{made.stdout}{made.stderr}\n"
            "On Debian or Ubuntu: apt-get install python3-venv"
        )


def pip(venv: Path, *arguments: str, total: int = 0) -> None:
    """Run pip in the environment, showing how many packages it has come to; raises with pip's last lines."""
    command = [str(venv_python(venv)), "-m", "pip", "--disable-pip-version-check", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert process.stdout is not None
    lines: list[str] = []
    count = 0
    for line in process.stdout:
        lines.append(line.rstrip())
        if total and line.startswith(("Collecting ", "Processing ", "Requirement already satisfied: ")):
            count += 1
            words = line.removeprefix("Requirement already satisfied: ").split(" (from")[0].split(" in ")[0].split()
            name = words[-1].rsplit("/", 1)[-1]
            if sys.stdout.isatty():
                print(f"\r  [{count}/{total}] {name:<60}", end="", flush=True)
            elif count % 25 == 0 or count == total:
                say(f"  [{count}/{total}] {name}")
        elif total and line.startswith("Installing collected packages"):
            if sys.stdout.isatty():
                print()
            say("  unpacking")
    if process.wait() != 0:
        tail = "\n".join(lines[-TAIL:])
        raise InstallError(f"pip failed: {' '.join(command)}\n{tail}")


def is_cpu_build(report: dict[str, object]) -> bool:
    """Whether pip's report chose a torch without CUDA: a +cpu version, or one that asks for no CUDA libraries."""
    installs = report.get("install")
    if not isinstance(installs, list) or not installs:
        return True  # nothing to install
    metadata = installs[0]["metadata"]
    if metadata["version"].endswith("+cpu") or sys.platform == "darwin":
        return True
    return not any(need.lower().startswith(("nvidia", "cuda")) for need in metadata.get("requires_dist", []))


def install_torch(venv: Path, requirement: str) -> None:
    """Install the CPU build of torch: from where pip is set to look if that gives one, else from torch's own index.

    The default index has a CUDA build under the same version on Linux, with gigabytes of libraries.
    """
    python = str(venv_python(venv))
    version = requirement.split("==")[1]
    code = "import importlib.metadata as m; print(m.version('torch'))"
    present = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    if present == (version if sys.platform == "darwin" else f"{version}+cpu"):
        return
    say(f"Installing {requirement} (CPU build)")
    dry = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--report", "-"]
    asked = subprocess.run([*dry, requirement], capture_output=True, text=True)
    if asked.returncode == 0 and is_cpu_build(json.loads(asked.stdout)):
        pip(venv, "install", "--no-deps", requirement)
        return
    try:
        pip(venv, "install", "--no-deps", "--index-url", CPU_INDEX, requirement)
    except InstallError as error:
        raise InstallError(
            f"{error}\n\nNo CPU build of {requirement} was found where pip looks, nor at {CPU_INDEX}.\n"
            f"Fetch the wheel torch-{version}+cpu for your Python and platform, put it in a folder,\n"
            "and run again with\n  PIP_FIND_LINKS=/that/folder make install\n"
            "On a machine with an NVIDIA GPU: pip install 'xloom[cuda]'."
        ) from None


def install(venv: Path, extras: list[str]) -> None:
    """Bring the environment up to the lock files of the extras, and xloom itself in editable form."""
    wanted = {extra: digest(extra) for extra in extras}
    stamp = read_stamp(venv)
    if venv_python(venv).exists() and all(stamp.get(extra) == wanted[extra] for extra in extras):
        return
    started = time.monotonic()
    make_venv(venv)
    (venv / STAMP).unlink(missing_ok=True)  # an install cut short must not look complete
    base = pins("cpu")
    pip(venv, "install", *[base[name] for name in BOOTSTRAP])
    for extra in extras:
        needed = pins(extra)
        if "torch" in needed:
            install_torch(venv, needed["torch"])
        say(f"Installing {extra}: {len(needed)} packages")
        where = []
        if extra in OVERLAYS:
            folder = venv / OVERLAYS[extra]
            shutil.rmtree(folder, ignore_errors=True)  # pip adds to such a folder, and takes nothing out
            where = ["--target", str(folder)]
        lines = [line for name, line in needed.items() if name not in ("torch", *BOOTSTRAP)]
        pip(venv, "install", "--no-deps", *where, *lines, total=len(lines))
    say("Installing xloom")
    pip(venv, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    partial = venv / f"{STAMP}.part"
    partial.write_text(json.dumps({**stamp, **wanted}), encoding="utf-8")
    os.replace(partial, venv / STAMP)
    say(f"Installed in {time.monotonic() - started:.0f} s: {venv / 'bin' / 'xloom'}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python3 requirements/install.py --venv .venv cpu dev",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"of {', '.join(EXTRAS)} (default: cpu)")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the virtual environment (default: .venv)")
    arguments = parser.parse_args()
    unknown = [extra for extra in arguments.extras if extra not in EXTRAS]
    if unknown:
        parser.error(f"unknown extra {unknown[0]!r}; choose from {', '.join(EXTRAS)}")
    bases = [base for base in BASES if base in arguments.extras] or ["cpu"]
    extras = [*bases, *[extra for extra in arguments.extras if extra not in BASES]]
    try:
        install(arguments.venv.absolute(), extras)
    except InstallError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run it again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
