"""Each combination of extras that can be installed on this machine, in an environment of its own.

`nox` runs all, `nox -s edge` one. Environments lie in .nox/ and are made by requirements/install.py, which finds the
CPU build of torch; a second run installs nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
# Tests of what needs no engine and no adapter maths.
CORE_TESTS = (
    "tests/unit/test_cli.py",
    "tests/unit/test_settings.py",
    "tests/unit/wire",
    "tests/unit/autoscaling",
    "tests/unit/engines/test_kv_size.py",
    "tests/unit/engines/test_registry.py",
    "tests/unit/observability/test_recorder.py",
    "tests/unit/router/test_placement.py",
    "tests/unit/router/test_replay.py",
    "tests/unit/commands/test_chat.py",
    "tests/unit/commands/test_checks.py",
    "tests/unit/commands/test_remote.py",
)
# What edge runs once PEFT is there to compare with.
EDGE_TESTS = (
    "tests/conformance/test_backends.py",
    "tests/unit/commands/test_detokeniser.py",
    "tests/unit/commands/test_local.py",
    "tests/unit/engines/transformers/test_backend.py",
    "tests/unit/engines/transformers/test_batch.py",
    "tests/unit/engines/transformers/test_sampling.py",
    "tests/unit/mixtures/test_reference.py",
)
ORACLE = ("peft", "accelerate")  # what the tests compare with; not needed to run

nox.options.default_venv_backend = "none"
nox.options.sessions = ["core", "edge", "cpu", "mistralrs"]


def environment(session: nox.Session, *extras: str) -> Path:
    """The folder of programs of the session's environment, with these extras and what tests need."""
    venv = ROOT / ".nox" / session.name
    session.run(sys.executable, "requirements/install.py", "--venv", str(venv), *extras, "dev", external=True)
    return venv / "bin"


def pytest(session: nox.Session, programs: Path, *tests: str) -> None:
    """Run tests in the session's environment."""
    session.run(str(programs / "python"), "-m", "pytest", "-q", *tests, external=True)


def absent(session: nox.Session, programs: Path, *packages: str) -> None:
    """Fail unless these packages are missing: a test that finds them proves nothing."""
    code = f"from importlib.util import find_spec; assert not [name for name in {packages!r} if find_spec(name)]"
    session.run(str(programs / "python"), "-c", code, external=True)


def pinned(package: str) -> str:
    """A package's line of cpu.lock."""
    lines = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


@nox.session
def core(session: nox.Session) -> None:
    """No extra: the command line, settings, and `xloom doctor`, which says what to install."""
    programs = environment(session, "core")
    absent(session, programs, "torch", "transformers", "vllm", "ray")
    found = session.run(str(programs / "xloom"), "doctor", "--json", external=True, silent=True, success_codes=[1])
    cures = {finding["cure"] for finding in json.loads(str(found))["findings"] if finding["level"] == "fail"}
    if not cures or "" in cures:
        session.error(f"xloom doctor does not say what to install: {found}")
    pytest(session, programs, *CORE_TESTS, "-k", "not looks_at_this_machine")  # a machine that serves


@nox.session
def edge(session: nox.Session) -> None:
    """xloom[edge]: the transformers backend in one process, without vLLM, Ray or PEFT."""
    programs = environment(session, "edge")
    absent(session, programs, "vllm", "ray")
    pytest(session, programs, "tests/integration/test_edge.py", *CORE_TESTS)
    # The oracle comes last, so that all before ran without it.
    pip = [str(programs / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    session.run(*pip, *map(pinned, ORACLE), external=True)
    pytest(session, programs, *EDGE_TESTS)


@nox.session
def cpu(session: nox.Session) -> None:
    """xloom[cpu]: vLLM and Ray on CPU; every test that is not slow."""
    pytest(session, environment(session, "cpu", "isq"), "tests", "-m", "not slow")


@nox.session
def mistralrs(session: nox.Session) -> None:
    """xloom[cpu,mistralrs]: the third backend beside the others."""
    programs = environment(session, "cpu", "mistralrs")
    pytest(session, programs, "tests/conformance", "tests/unit/engines", "-k", "mistralrs")
