"""The reference in plain torch, against PEFT; and where it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import HIDDEN, load_model, peft_logits, peft_lora, peft_xlora, tiny_adapter, tiny_bundle, tiny_model
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle, prepare_lora
from xloom.protocol import XloomError
from xloom.settings import ModelSettings
from xloom.verification.comparison import Scores, distance
from xloom.verification.judgement import BASE, EVEN, HELD, SUM
from xloom.verification.loading import Place, choose_place, load_reference
from xloom.verification.plain_model import PlainModel, changes_something

PROMPT, ANSWER = list(range(40, 60)), (7, 90, 31, 200)
GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    base = tiny_model(folder / "base", "llama")
    modules = linear_modules(str(base))
    prepare_lora(tiny_adapter(folder / "code", base, seed=7), modules, folder / "code-prepared", max_rank=64)
    bundle = tiny_bundle(folder / "blend", base, seed=3)
    prepare_bundle(bundle, modules, folder / "blend-prepared", hidden_size=HIDDEN, max_rank=64)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> PlainModel:
    return PlainModel(load_model(folder / "base"))


def scores_of(logits: torch.Tensor) -> Scores:
    ids = torch.tensor([*PROMPT, *ANSWER])
    own = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0].tolist()
    return Scores(tuple(own[: len(PROMPT) - 1]), ANSWER, tuple(own[len(PROMPT) - 1 :]))


def test_base_adapter_and_mixture_are_pefts(folder: Path, plain: PlainModel) -> None:
    asked = Scores((), ANSWER, ())
    code, _ = plain.served([PROMPT], [asked], folder / "code-prepared", all_faults=True)
    blend, wrong = plain.served([PROMPT], [asked], folder / "blend-prepared", all_faults=True)
    ids = [*PROMPT, *ANSWER]
    oracles = {
        "base": scores_of(peft_logits(load_model(folder / "base"), ids)),
        "code": scores_of(peft_logits(peft_lora(folder / "base", folder / "code"), ids)),
        "blend": scores_of(peft_logits(peft_xlora(folder / "base", folder / "blend"), ids)),
    }
    assert distance([plain.scores(PROMPT, ANSWER)], [oracles["base"]]).worst < 1e-5
    assert distance(code, [oracles["code"]]).worst < 1e-5
    assert distance(blend, [oracles["blend"]]).worst < 1e-5
    assert set(wrong) == {BASE, SUM, EVEN, HELD}
    assert all(distance(blend, scores).worst > 0.01 for scores in wrong.values())


def test_held_gates_are_wrong_only_after_the_prompt(folder: Path, plain: PlainModel) -> None:
    asked = Scores((), ANSWER, ())
    blend, wrong = plain.served([PROMPT], [asked], folder / "blend-prepared", all_faults=True)
    assert distance(blend, wrong[HELD]).prompt == pytest.approx(0, abs=1e-5)


def test_zero_weights_change_nothing(folder: Path, tmp_path: Path) -> None:
    base = folder / "base"
    zero = tiny_adapter(tmp_path / "zero", base, strength=0)
    prepare_lora(zero, linear_modules(str(base)), tmp_path / "prepared", max_rank=64)
    assert not changes_something(tmp_path / "prepared")
    assert changes_something(folder / "code-prepared")


@pytest.mark.parametrize(
    ("gpu", "memory", "place"),
    [
        (80, 200, Place("cuda", "float32")),
        (24, 200, Place("cuda", "bfloat16")),
        (12, 200, Place("cpu", "float32")),
        (None, 200, Place("cpu", "float32")),
        (None, 20, Place("cpu", "bfloat16")),
        (None, None, Place("cpu", "float32")),
        (12, 12, None),
    ],
)
def test_seven_billion_parameters_run_where_they_fit(gpu: int | None, memory: int | None, place: Place | None) -> None:
    sizes = {"gpu": gpu, "memory": memory}
    free = {name: None if size is None else size * GIB for name, size in sizes.items()}
    assert choose_place(7_000_000_000, "bfloat16", **free) == place


def test_a_model_that_may_take_no_memory_has_no_reference(folder: Path) -> None:
    with pytest.raises(XloomError) as caught:
        load_reference(ModelSettings(source=str(folder / "base")), None, "cpu", most_bytes=1000)
    assert caught.value.code == "no_reference"


def test_a_model_quantised_for_engines_has_no_reference(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    config = (base / "config.json").read_text()
    quantised = config.rstrip().removesuffix("}") + ', "quantization_config": {"quant_method": "gptq", "bits": 4}}'
    (base / "config.json").write_text(quantised)
    with pytest.raises(XloomError) as caught:
        load_reference(ModelSettings(source=str(base)), None, "cpu")
    assert caught.value.code == "no_reference"
