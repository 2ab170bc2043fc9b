"""General knowledge subtracted from the adapters of an Arrow mixture, as PEFT does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import load_model, peft_arrow, peft_greedy, peft_logits, tiny_adapter, tiny_model
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare_mixture import prepare_mixture
from xloom.mixtures.reference import OnePassReference
from xloom.protocol import Blend, XloomError

PROMPT = [72, 17, 203, 5, 140, 99, 7, 250, 31, 64, 12, 181]
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("general") / "model", "llama")


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    task = {"code": 8, "docs": 12, "maths": 5}
    found = {
        name: tiny_adapter(model.parent / name, model, rank=4, alpha=alpha, targets=TARGETS, seed=seed, leading=4.0)
        for seed, (name, alpha) in enumerate(task.items())
    }
    for seed, name in enumerate(("english", "german"), start=7):
        found[name] = tiny_adapter(model.parent / name, model, rank=4, alpha=20, targets=TARGETS, seed=seed)
    found["small"] = tiny_adapter(model.parent / "small", model, rank=2, targets=TARGETS)
    found["narrow"] = tiny_adapter(model.parent / "narrow", model, rank=4, targets=TARGETS[:2])
    return found


def prepare(model: Path, folders: dict[str, Path], out: Path, blend: Blend) -> None:
    used = {name: folders[name] for name in blend.sources}
    prepare_mixture(blend, used, linear_modules(str(model)), out, max_rank=64)


@pytest.mark.parametrize("general", [("english",), ("english", "german")])
def test_arrow_without_general_knowledge_equals_pefts(
    model: Path, folders: dict[str, Path], tmp_path: Path, general: tuple[str, ...]
) -> None:
    mixed = dict.fromkeys(("code", "docs", "maths"), "")
    blend = Blend("arrow", mixed, top_k=2, temperature=0.5, subtract=dict.fromkeys(general, ""))
    prepare(model, folders, tmp_path / "less", blend)
    found = OnePassReference.load(load_model(model), tmp_path / "less")
    peft = peft_arrow(model, [folders[name] for name in mixed], 2, 0.5, [folders[name] for name in general])
    torch.testing.assert_close(found.logits(PROMPT), peft_logits(peft, PROMPT), atol=1e-3, rtol=0)
    assert found.greedy(PROMPT, 8) == peft_greedy(peft, PROMPT, 8)
    prepare(model, folders, tmp_path / "whole", Blend("arrow", mixed, top_k=2, temperature=0.5))
    whole = OnePassReference.load(load_model(model), tmp_path / "whole").logits(PROMPT)
    assert (found.logits(PROMPT) - whole).abs().max() > 0.1


@pytest.mark.parametrize(
    ("routing", "general", "said"),
    [
        ("arrow", "small", "its rank is 2, not 4"),
        ("arrow", "narrow", r"down_proj its rank is 0, not 4"),
        ("fixed", "english", "is for routing arrow"),
    ],
)
def test_what_can_not_be_subtracted_is_refused(
    model: Path, folders: dict[str, Path], tmp_path: Path, routing: str, general: str, said: str
) -> None:
    blend = Blend(routing, dict.fromkeys(("code", "docs"), ""), subtract={general: ""})
    with pytest.raises(XloomError, match=said) as failure:
        prepare(model, folders, tmp_path, blend)
    assert failure.value.code == "invalid_mixture"
