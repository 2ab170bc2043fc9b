"""Walk-throughs: each block of commands is one that a test runs, or says why it is not run here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.pages import ROOT, WALK_THROUGHS, Block, Reader, blocks, to_run

PAGES = [page for page in WALK_THROUGHS if (ROOT / "docs" / page).exists()]
BASH = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def one_block(text: str) -> Block:
    return Block("page.md", 1, text)


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_of_a_walk_through_says_what_it_is(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    opened = re.findall(r"^ *```(\S*)", text, re.MULTILINE)[::2]
    assert "" not in opened
    assert "bash" not in opened  # it would be run by nobody
    assert opened.count("sh") == len(blocks(page))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_run_by_a_test(page: str) -> None:
    assert to_run(page)
    runners = [file for file in (ROOT / "tests" / "e2e").rglob("test_*.py") if f'to_run("{page}")' in file.read_text()]
    assert len(runners) == 1


@BASH
@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page)], ids=str)
def test_every_block_is_a_script_and_what_is_not_run_says_why(block: Block) -> None:
    assert block.commands
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    assert ("not run here" in block.text) is (block.reason is not None)


def test_a_reason_is_the_first_line() -> None:
    assert one_block("# not run here: needs a cluster\nkubectl get pods\n").reason == "needs a cluster"
    assert one_block("kubectl get pods\n").reason is None
    goes_on = one_block("# a b\nxloom serve \\\n  --port 1  # until Ctrl-C\n")
    assert goes_on.commands == [["xloom", "serve", "--port", "1"]]


@BASH
def test_a_block_is_run_with_the_readers_names(tmp_path: Path) -> None:
    reader = Reader(tmp_path, {"WHO": "me"}, {"HEAD": "head", "http://HEAD:1": "where"})
    assert reader.run(one_block("echo $WHO http://HEAD:1 HEAD > said\ncat said\n")) == "me where head\n"
    assert (tmp_path / "said").exists()
    assert (tmp_path / "pyproject.toml").is_symlink()


@BASH
def test_a_block_fails_with_any_of_its_commands(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such file"):
        Reader(tmp_path, {}).run(one_block("echo no such file\nfalse\necho done\n"))


@BASH
def test_a_block_that_stays_runs_until_it_is_ended(tmp_path: Path) -> None:
    script = "# until Ctrl-C\ntrap 'echo ended > said; exit 0' INT\necho ready\nwhile sleep 0.1; do :; done\n"
    with Reader(tmp_path, {}).running(one_block(script), "ready") as said:
        assert said == "ready\n"
        assert not (tmp_path / "said").exists()
    assert (tmp_path / "said").exists()


@BASH
def test_a_block_that_ends_too_soon_is_a_failure(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="never said ready"),
        Reader(tmp_path, {}).running(one_block("# until Ctrl-C\necho oh\n"), "ready"),
    ):
        pass
