"""What docs/sample.md says of the sample, on fewer held-out rows."""

from __future__ import annotations

import re

import pytest

from xloom.sample.corpus import DOMAINS
from xloom.sample.evaluate import evaluate
from xloom.settings import SAMPLE

Result = dict[str, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def result() -> Result:
    return evaluate(SAMPLE, count=6, seed=11)


def test_the_sample_is_small_and_holds_no_pickle() -> None:
    files = [path for path in SAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 12_000_000
    assert {path.suffix for path in files} <= {".py", ".json", ".jinja", ".safetensors", ".yaml"}
    written = {path.relative_to(SAMPLE).as_posix() for path in files}
    weights = ["base/model", *(f"adapters/{domain}/adapter_model" for domain in DOMAINS), "blend/adapter_model"]
    assert {f"{name}.safetensors" for name in weights} <= written


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_adapter_wins_on_its_own_domain(result: Result, domain: str) -> None:
    table = result["perplexity"]
    others = [table[name][domain] for name in ("base", *DOMAINS) if name != domain]
    assert table[domain][domain] < min(others)


@pytest.mark.parametrize("domain", DOMAINS)
def test_xlora_is_within_a_few_per_cent_of_the_best_adapter(result: Result, domain: str) -> None:
    table = result["perplexity"]
    assert table["X-LoRA"][domain] < 1.05 * min(table[name][domain] for name in DOMAINS)


def test_xlora_beats_each_adapter_on_mixed_text(result: Result) -> None:
    table = result["perplexity"]
    assert table["X-LoRA"]["mixed"] < min(table[name]["mixed"] for name in DOMAINS)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_matching_adapters_gate_is_the_largest(result: Result, domain: str) -> None:
    gates = result["gates"][domain]
    assert max(gates, key=lambda name: gates[name]) == domain


def test_the_configurations_hold_no_absolute_path() -> None:
    for path in SAMPLE.rglob("*config.json"):
        assert not re.search(r'"/', path.read_text(encoding="utf-8")), path
