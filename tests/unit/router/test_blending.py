"""What a mixture is made of that is asked for at run time."""

from __future__ import annotations

import pytest

from xloom.adapters.manifest import Entry
from xloom.protocol import Blend, XloomError
from xloom.router.blending import blend_of

SERVED = (
    Entry("code", "lora", "g1", 8, (), 1, "hf://org/code-v2"),
    Entry("org/docs", "lora", "g2", 8, (), 1, "hf://org/docs"),
    Entry("both", "arrow", "g3", 16, (), 1, "arrow: code, docs", adapters=("code", "docs")),
)


def test_served_adapters_are_the_stores_own_and_others_are_sources() -> None:
    blend = blend_of(Blend("arrow", {}, top_k=1), ["code", "org/docs", "hf://org/maths@main"], SERVED)
    assert blend == Blend(
        "arrow",
        {"code": "hf://org/code-v2", "org/docs": "hf://org/docs", "maths": "hf://org/maths@main"},
        top_k=1,
        generations={"code": "g1", "org/docs": "g2"},
    )


def test_what_is_subtracted_is_the_stores_own_or_a_source_too() -> None:
    blend = blend_of(Blend("arrow", {}), ["code", "hf://org/maths"], SERVED, ["org/docs", "hf://org/general"])
    assert blend.subtract == {"org/docs": "hf://org/docs", "general": "hf://org/general"}
    assert blend.generations == {"code": "g1", "org/docs": "g2"}
    with pytest.raises(XloomError, match="called 'maths'"):
        blend_of(Blend("arrow", {}), ["code", "hf://org/maths"], SERVED, ["hf://elsewhere/maths"])


@pytest.mark.parametrize(
    ("adapters", "code", "said"),
    [
        (["code", "both"], "invalid_mixture", "is a mixture itself"),
        (["code", "code"], "invalid_mixture", "called 'code'"),
        (["code", "hf://elsewhere/code"], "invalid_mixture", "called 'code'"),
        (["code", "poems"], "adapter_not_found", "Adapters are: code, org/docs"),
    ],
)
def test_what_can_not_be_mixed_is_refused(adapters: list[str], code: str, said: str) -> None:
    with pytest.raises(XloomError, match=said) as failure:
        blend_of(Blend("arrow", {}), adapters, SERVED)
    assert failure.value.code == code
