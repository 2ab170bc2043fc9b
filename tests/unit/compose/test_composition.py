"""A plan from its text to a router on disk: learned, written, judged, and gone on with after an interruption."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.models import ATTENTION, MLP, load_model, peft_logits, peft_xlora, tiny_bundle
from xloom.compose import course
from xloom.compose.checkpoint import FILE
from xloom.compose.composition import Composed, Listener, compose
from xloom.compose.evaluation import perplexity
from xloom.compose.mixture import Mixture
from xloom.compose.options import Options
from xloom.compose.plan import Plan
from xloom.compose.router import Router
from xloom.compose.text import Streams, held_out_rows, text_encoder
from xloom.compose.training import Told
from xloom.mixtures.linear_router import LinearRouter as SavedRouter
from xloom.mixtures.linear_router import load_linear_router
from xloom.mixtures.lora import read_lora
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.reference import reference_logits
from xloom.mixtures.stacking import stack_adapters
from xloom.protocol import XloomError
from xloom.settings import ModelSettings

ROW = [104, 101, 108, 49, 50, 43, 97, 98, 99, 61, 52]
SMALL = Options(steps=12, batch=4, length=32, held_out_rows=2, learning_rate=0.05, domain_share=5.0)


class Interrupting(Listener):
    """Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.told: list[Told] = []

    def step(self, told: Told) -> None:
        self.told.append(told)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class SavedGates(Router):
    """The gates of a router file, by the formula its format has."""

    def __init__(self, saved: SavedRouter, names: Sequence[str]) -> None:
        super().__init__()
        self.layers = [saved.layers[name] for name in names]
        self.saved = saved

    def gates(self, place: int, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.layers[place]
        logits = (x @ weight.T + bias) / self.saved.temperature
        return torch.softmax(logits, -1) if self.saved.activation == "softmax" else torch.sigmoid(logits)


@pytest.fixture
def plan(llama: Path, adapters: dict[str, Path], texts: dict[str, str], tmp_path: Path) -> Plan:
    return Plan(
        base=ModelSettings(source=str(llama)),
        adapters=adapters,
        text=texts,
        mixed=None,
        out=tmp_path / "blend",
        device="cpu",
        options=SMALL,
    )


def done(plan: Plan, listener: Listener | None = None) -> Composed:
    return compose(plan, AutoTokenizer.from_pretrained(plan.base.source), listener)


def with_options(plan: Plan, **options: Any) -> Plan:
    return dataclasses.replace(plan, options=dataclasses.replace(plan.options, **options))


def outcome(plan: Plan) -> dict[str, torch.Tensor]:
    name = "router" if plan.options.routing == "linear" else "adapter_model"
    return load_file(plan.out / f"{name}.safetensors")


def test_a_linear_router_learns_the_domains_and_is_what_its_file_says(llama: Path, plan: Plan) -> None:
    composed = done(with_options(plan, steps=60))
    for name in ("words", "sums"):
        gates = composed.figures.gates["router"][name]
        assert max(gates, key=lambda each: gates[each]) == name
        assert gates[name] > 0.7
    assert set(composed.figures.perplexity) == {"base", "adapter words", "adapter sums", "uniform", "arrow", "router"}
    assert all(set(values) == {"words", "sums", "mixed"} for values in composed.figures.perplexity.values())
    saved = load_linear_router(plan.out)
    assert list(saved.adapters) == ["words", "sums"]
    modules = linear_modules(str(llama))
    read = {name: read_lora(plan.out / folder, modules) for name, folder in saved.adapters.items()}
    stack = stack_adapters(read, modules)
    assert set(saved.layers) == set(stack.modules)
    mixture = Mixture(load_model(llama), stack)
    encode = text_encoder(AutoTokenizer.from_pretrained(llama))
    rows = held_out_rows(Streams.read(plan.text, None, encode, held_out=True, limit=10_000), 2, 512, 0)
    router = SavedGates(saved, stack.modules)
    for column, expected in composed.figures.perplexity["router"].items():
        assert perplexity(mixture, router, rows[column]) == pytest.approx(expected, rel=1e-4)
    record = json.loads((plan.out / "compose.json").read_text())
    assert record["perplexity"] == composed.figures.perplexity


@pytest.mark.parametrize("options", [{}, {"depth": 2, "size": 16}, {"layerwise": False, "temperature": 0.5}], ids=str)
def test_an_xlora_router_is_served_and_equals_peft(llama: Path, plan: Plan, options: dict[str, Any]) -> None:
    plan = with_options(plan, routing="xlora", **options)
    composed = done(plan)
    gates = composed.figures.gates["router"]
    assert gates["words"]["words"] > gates["sums"]["words"] + 0.1
    expected = peft_logits(peft_xlora(llama, plan.out), ROW)
    prepared = plan.out.with_name("prepared")
    prepare_bundle(plan.out, linear_modules(str(llama)), prepared, hidden_size=64, max_rank=64)
    found = reference_logits(load_model(llama), prepared, ROW)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert json.loads((prepared / "xlora.json").read_text())["adapter_names"] == ["words", "sums"]


@pytest.mark.parametrize("even", [True, False])
def test_a_bundles_gates_are_fitted_then_tuned(llama: Path, plan: Plan, tmp_path: Path, even: bool) -> None:
    targets = (ATTENTION + MLP, ATTENTION + MLP if even else ("q_proj", "down_proj"))
    specs = tuple({"rank": 4, "alpha": 4, "targets": each} for each in targets)
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=specs)
    plan = dataclasses.replace(plan, adapters={}, bundle=bundle)
    fitted = done(with_options(plan, fitted_rows=64))
    assert fitted.agreement is not None
    assert fitted.agreement.adapters > (0.6 if even else 0.8)
    assert {"bundle", "router"} <= set(fitted.figures.perplexity)
    saved = load_linear_router(plan.out)
    assert saved.activation == ("softmax" if even else "sigmoid")
    assert list(saved.adapters) == ["0", "1"]
    tuned = dataclasses.replace(plan, out=tmp_path / "tuned")
    listener = Interrupting(-1)
    composed = done(with_options(tuned, fitted_rows=64, tune=12), listener)
    assert [told.step for told in listener.told] == list(range(1, 13))
    assert composed.figures.perplexity["router"]["mixed"] < fitted.figures.perplexity["router"]["mixed"]


@pytest.mark.parametrize(("after", "options"), [(5, {}), (5, {"routing": "xlora"}), (12, {})], ids=str)
def test_an_interrupted_training_goes_on_to_the_same_end(
    plan: Plan, tmp_path: Path, after: int, options: dict[str, Any]
) -> None:
    plan = with_options(plan, **options)
    whole = dataclasses.replace(plan, out=tmp_path / "whole")
    done(whole)
    with pytest.raises(KeyboardInterrupt):
        done(plan, Interrupting(after))
    assert [file.name for file in plan.out.iterdir()] == [FILE]
    listener = Interrupting(-1)
    done(plan, listener)
    assert [told.step for told in listener.told] == list(range(after + 1, 13))
    assert not (plan.out / FILE).exists()
    first, second = outcome(whole), outcome(plan)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_that_was_killed_goes_on_from_its_last_checkpoint(plan: Plan, tmp_path: Path) -> None:
    class Killed(Listener):
        def step(self, told: Told) -> None:
            if told.step == 7:
                raise SystemExit

    whole = dataclasses.replace(plan, out=tmp_path / "whole")
    done(whole)
    tokenizer = AutoTokenizer.from_pretrained(plan.base.source)
    with pytest.raises(SystemExit):
        compose(plan, tokenizer, Killed(), save_s=0.0)
    (plan.out / "checkpoint.part").write_bytes(b"of a write that did not end")
    listener = Interrupting(-1)
    done(plan, listener)
    assert [told.step for told in listener.told] == list(range(7, 13))
    assert all(torch.equal(tensor, outcome(plan)[name]) for name, tensor in outcome(whole).items())
    assert not list(plan.out.glob("checkpoint*"))


def test_an_interrupted_tuning_goes_on_where_it_was(llama: Path, plan: Plan, tmp_path: Path) -> None:
    specs = tuple({"rank": 4, "alpha": 4, "targets": ATTENTION} for _ in range(2))
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=specs)
    plan = with_options(dataclasses.replace(plan, adapters={}, bundle=bundle), tune=6)
    whole = dataclasses.replace(plan, out=tmp_path / "whole")
    done(whole)
    with pytest.raises(KeyboardInterrupt):
        done(plan, Interrupting(2))
    listener = Interrupting(-1)
    done(plan, listener)
    assert [told.step for told in listener.told] == [3, 4, 5, 6]
    assert all(torch.equal(tensor, outcome(plan)[name]) for name, tensor in outcome(whole).items())


def test_a_checkpoint_of_other_options_is_not_gone_on_with(plan: Plan) -> None:
    with pytest.raises(KeyboardInterrupt):
        done(plan, Interrupting(2))
    with pytest.raises(XloomError) as caught:
        done(with_options(plan, seed=1))
    assert caught.value.code == "checkpoint_unusable"
    (plan.out / FILE).write_bytes(b"short")
    with pytest.raises(XloomError) as caught:
        done(plan)
    assert caught.value.code == "checkpoint_unusable"


def test_mixed_text_is_trained_on_and_judged(plan: Plan, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.txt"
    mixed.write_text("\n\n".join(f"abc{number}+1={number + 1}" * 8 for number in range(64)))
    composed = done(dataclasses.replace(plan, mixed=str(mixed)))
    assert composed.figures.gates["router"]["mixed"]["words"] < composed.figures.gates["router"]["words"]["words"]


def test_a_loss_that_is_no_number_ends_the_training(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: Any) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setattr(course, "language_loss", nothing)
    with pytest.raises(XloomError) as caught:
        done(plan)
    assert caught.value.code == "diverged"
