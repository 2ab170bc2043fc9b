"""The backends' feature matrix is what the backends say, and the page shows it."""

from __future__ import annotations

from pathlib import Path

from xloom.commands.features import BACKENDS, BEGIN, END, INSTALL_MIB, matrix, rows, with_matrix
from xloom.engines.base import Capabilities, Device

PAGE = Path(__file__).parents[3] / "docs" / "backends.md"
CAN = {
    "one": Capabilities(
        True,
        ("cpu", "cuda"),
        ("cpu", "cuda"),
        {"cpu": frozenset({("rtn", 8), ("rtn", 4)}), "cuda": frozenset({("rtn", 2)})},
    ),
    "two": Capabilities(
        False, (), ("metal",), {device: frozenset({("awq", 4)}) for device in ("cpu", "cuda", "metal")}
    ),
}


EVERYWHERE: dict[str, tuple[Device, ...]] = dict.fromkeys(CAN, ("cpu", "cuda", "metal"))


def test_each_backend_has_a_column_of_what_it_can_do() -> None:
    table = {row[0]: row[1:] for row in rows(CAN, {"one": 1234}, EVERYWHERE, EVERYWHERE)}
    assert table["feature"] == ["one", "two"]
    assert table["PagedAttention"] == ["yes", "no"]
    assert table["X-LoRA"] == ["CPU, CUDA: yes", "no"]
    assert table["CUDA"] == ["yes", "no"]
    assert table["Metal"] == ["no", "yes"]
    assert table["install size (MiB)"] == ["1,234", "not measured"]


def test_quantisation_says_bits_and_where() -> None:
    table = {row[0]: row[1:] for row in rows(CAN, {}, EVERYWHERE, EVERYWHERE)}
    assert table["ISQ, `rtn`"] == ["4, 8 bits (CPU); 2 bits (CUDA)", "no"]
    assert table["ISQ, `awq`"] == ["no", "4 bits"]
    assert table["ISQ, `gptq`"] == ["no", "no"]


def test_what_was_not_run_says_so() -> None:
    table = {row[0]: row[1:] for row in rows(CAN, {}, {"one": ("cpu", "cuda")}, {"one": ("cpu",)})}
    assert table["X-LoRA"] == ["CPU, CUDA: yes", "no"]
    assert (table["CPU"], table["CUDA"], table["Metal"]) == (["yes", "no"], ["yes", "no"], ["no", "not run"])
    assert table["ISQ, `rtn`"] == ["4, 8 bits (CPU); 2 bits (CUDA: not run)", "no"]
    assert table["ISQ, `awq`"] == ["no", "4 bits (CPU, CUDA, Metal: not run)"]
    table = {row[0]: row[1:] for row in rows(CAN, {}, {"one": ("cpu",)}, {})}
    assert table["X-LoRA"] == ["CPU: yes; CUDA: not run", "no"]


def test_the_table_takes_the_place_of_the_old_one() -> None:
    page = with_matrix(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page == f"before\n{BEGIN}\n{matrix()}\n{END}\nafter\n"
    assert with_matrix(page) == page


def test_the_page_shows_what_the_code_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_matrix(page) == page, "run: python -m xloom.commands.features docs/backends.md"


def test_every_backend_has_its_size() -> None:
    assert INSTALL_MIB.keys() == BACKENDS.keys()
    assert all(size > 0 for size in INSTALL_MIB.values())
