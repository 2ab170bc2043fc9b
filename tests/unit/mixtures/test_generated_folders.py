"""Generated adapter folders and bundles: what is prepared computes what PEFT computes, or the add is refused."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.models import (
    ATTENTION,
    HIDDEN,
    MLP,
    load_model,
    peft_logits,
    peft_lora,
    peft_xlora,
    tiny_adapter,
    tiny_bundle,
)
from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.hooks import Adapter, Span, adapted
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle, prepare_lora
from xloom.mixtures.reference import reference_logits
from xloom.protocol import XloomError

PROMPT = [72, 17, 203, 5, 140, 99]
LINEARS = ATTENTION + MLP
QUICK = settings(deadline=None, derandomize=True)
EXTRAS = ("head", "embeddings", "norm", "trained head", "resized", "pair", "odd", "nan")
PLACES = ("paths", "paths", "outside", "gone", "saved", "saved, gone", "saved, trained", "none")
PREFIXES = {
    "peft": "base_model.model.model.",
    "none": "model.",
    "compiled": "_orig_mod.base_model.model.model.",
    "compiled inside": "base_model.model._orig_mod.model.",
    "parallel": "module.base_model.model.model.",
    "parallel inside": "base_model.model.module.model.",
    "sharded": "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.model.",
    "twice": "base_model.model.model.model.",
    "peft twice": "base_model.model.base_model.model.model.",
    "x-lora": "base_model.lora_model.model.model.",
}


@dataclass(frozen=True)
class Base:
    """The base model: its folder, its linears, and itself, which tests leave as it is."""

    folder: Path
    modules: dict[str, tuple[int, int]]
    model: PreTrainedModel


@pytest.fixture(scope="module")
def base(llama: Path) -> Base:
    return Base(llama, linear_modules(str(llama)), load_model(llama))


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """What one adapter folder is like; most are as PEFT saves them but for one or two things."""
    return {
        "rank": draw(st.integers(1, 6)),
        "alpha": draw(st.sampled_from([8, 8, 6.5, -3, 1, 0, 1e5, 1e30, 1e39, math.inf, math.nan])),
        "rslora": draw(st.booleans()),
        "targets": draw(st.lists(st.sampled_from(LINEARS), min_size=1, max_size=4, unique=True)),
        "layers": draw(st.sampled_from([None, None, [1]])),
        "written": draw(st.sampled_from(["list", "regex", "full names", "none"])),
        "pattern": draw(st.sampled_from([None, None, "name", "regex"])),
        "dtype": draw(
            st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
        ),
        "prefix": draw(st.sampled_from(list(PREFIXES))),
        "named": draw(st.booleans()),  # `.default.` in the names
        "shards": draw(st.sampled_from([1, 1, 3])),
        "bom": draw(st.booleans()),
        "lost": draw(st.sampled_from(["", "", "", "", "", "pair", "half", "emptied", "layer", "shard"])),
        "extra": draw(
            st.sampled_from(
                ["", "", "", "", "head", "embeddings", "norm", "trained head", "resized", "pair", "odd", "nan"]
            )
        ),
    }


def sound(spec: dict[str, Any]) -> bool:
    """Whether nothing is wrong with a folder, so that it must be taken."""
    whole = not spec["lost"] or (spec["lost"] == "shard" and spec["shards"] == 1)
    return whole and spec["extra"] in ("", "head", "embeddings", "norm") and abs(spec["alpha"]) < 100


def write(spec: dict[str, Any], base: Base, folder: Path) -> Path:
    """The folder of a spec; returned is the adapter that it was made of, as PEFT itself saves it."""
    config: dict[str, Any] = {}
    if spec["pattern"]:
        key = spec["targets"][0] if spec["pattern"] == "name" else rf".*\.1\..*{spec['targets'][0]}"
        config["alpha_pattern"] = {key: 5}
    shape = {name: spec[name] for name in ("rank", "rslora", "targets", "layers")}
    made = tiny_adapter(folder / "made", base.folder, alpha=spec["alpha"], config=config, **shape)
    values = {key: value.to(spec["dtype"]) for key, value in load_file(made / "adapter_model.safetensors").items()}
    save_file({key: value.float() for key, value in values.items()}, made / "adapter_model.safetensors")
    tensors = {key.removeprefix(PREFIXES["peft"]): value for key, value in values.items()}
    modules = sorted({key.split(".lora_")[0] for key in tensors})
    if spec["lost"] in ("pair", "half"):
        for part in "AB"[: 2 if spec["lost"] == "pair" else 1]:
            del tensors[f"{modules[-1]}.lora_{part}.weight"]
    if spec["lost"] == "emptied":
        tensors |= {f"{modules[0]}.lora_{part}.weight": torch.empty(0) for part in "AB"}
    if spec["lost"] == "layer":
        tensors = {key: value for key, value in tensors.items() if not key.startswith("layers.1.")}
    if spec["extra"] == "pair":
        module = next(name for name in base.modules if name.removeprefix("model.") not in modules and "layers" in name)
        out, size = base.modules[module]
        name = module.removeprefix("model.")
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, size), f"{name}.lora_B.weight": torch.ones(out, 2)}
    if spec["extra"] == "nan":
        tensors[f"{modules[0]}.lora_B.weight"] = torch.full_like(
            tensors[f"{modules[0]}.lora_B.weight"].float(), math.nan
        )
    prefix = PREFIXES[spec["prefix"]]
    suffix = ".default.weight" if spec["named"] else ".weight"
    named = {prefix + key.replace(".weight", suffix): value for key, value in tensors.items()}
    outer = prefix.removesuffix("model.")
    own = base.model.state_dict()
    named |= {
        "head": {f"{outer}lm_head.weight": own["lm_head.weight"].clone()},
        "embeddings": {f"{outer}model.embed_tokens.base_layer.weight": own["model.embed_tokens.weight"].clone()},
        "norm": {f"{outer}model.norm.weight": own["model.norm.weight"].clone()},
        "trained head": {f"{outer}lm_head.weight": own["lm_head.weight"] + 0.01},
        "resized": {f"{outer}model.embed_tokens.weight": torch.cat([own["model.embed_tokens.weight"]] * 2)},
        "odd": {f"{outer}model.surprise": torch.ones(2)},
    }.get(spec["extra"], {})
    given = folder / "given"
    given.mkdir()
    names = sorted(named)
    for number in range(spec["shards"]):
        file = f"adapter_model-{number + 1:05d}-of-{spec['shards']:05d}" if spec["shards"] > 1 else "adapter_model"
        if not (spec["lost"] == "shard" and spec["shards"] > 1 and number == 1):
            shard = {name: named[name] for name in names[number :: spec["shards"]]}
            save_file(shard, given / f"{file}.safetensors")
    written = json.loads((made / "adapter_config.json").read_text())
    full = sorted(f"model.{module}" for module in modules)
    written["target_modules"] = {
        "list": spec["targets"],
        "regex": rf".*\.({'|'.join(spec['targets'])})"
        if spec["layers"] is None
        else rf".*\.1\..*({'|'.join(spec['targets'])})",
        "full names": full,
        "none": None if not spec["lost"] and spec["extra"] != "pair" else spec["targets"],
    }[spec["written"]]
    text = json.dumps(written)
    (given / "adapter_config.json").write_text(text, encoding="utf-8-sig" if spec["bom"] else "utf-8")
    return made


def refusal(add: Callable[[], Any]) -> XloomError | None:
    """The error an add ends in, which has to come with a cure."""
    try:
        add()
    except XloomError as error:
        return error if error.cure else XloomError("no_cure", error.message)
    return None


@settings(QUICK, max_examples=60)
@given(spec=folders())
def test_a_generated_adapter_computes_what_peft_computes_or_is_refused(base: Base, spec: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = write(spec, base, folder)
        weights = BaseWeights(str(base.folder))
        error = refusal(lambda: prepare_lora(folder / "given", base.modules, folder / "out", max_rank=64, base=weights))
        if error is not None:
            assert error.code in ("broken_adapter", "unsupported_adapter"), error
            assert not (folder / "out").exists()
            assert not sound(spec), error
            return
        adapter = Adapter.load(folder / "out", dtype=torch.float32)
        with adapted(dict(base.model.named_modules()), [Span(slice(None), adapter)]):
            found = peft_logits(base.model, PROMPT)
        assert torch.isfinite(found).all()
        if abs(spec["alpha"]) < 100:  # beyond, float32's own rounding decides
            torch.testing.assert_close(found, peft_logits(peft_lora(base.folder, made), PROMPT), atol=1e-3, rtol=1e-3)


EXPERTS = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 4),
        "alpha": st.sampled_from([4, 8, -2]),
        "rslora": st.booleans(),
        "targets": st.lists(st.sampled_from(LINEARS), min_size=1, max_size=3, unique=True),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.float16]),
    }
)


@st.composite
def bundles(draw: st.DrawFn) -> dict[str, Any]:
    """What one bundle is like, how its adapters are named and where they lie."""
    adapters = draw(st.lists(EXPERTS, min_size=2, max_size=3))
    return {
        "adapters": [expert | {"seed": number} for number, expert in enumerate(adapters)],
        "depth": draw(st.integers(1, 3)),
        "layerwise": draw(st.booleans()),
        "softmax": draw(st.booleans()),
        "softmax_topk": draw(st.booleans()),
        "top_k": draw(st.sampled_from([None, 1, 2])),
        "temperature": draw(st.sampled_from([1.0, 0.5, 1e-40])),
        "scaling_pass_value": draw(st.sampled_from([0.0, 0.25, 1e30])),
        "global_scaling_weight": draw(st.sampled_from([1.0, 0.5, 1e30])),
        "order": draw(st.permutations(range(len(adapters)))),
        "given": draw(
            st.sampled_from(["paths", "paths", "outside", "gone", "saved", "saved, gone", "saved, trained", "none"])
        ),
        "lost": draw(st.sampled_from(["", "", "", "", "classifier layer", "classifier", "expert", "expert's tensor"])),
    }


def shuffled(spec: dict[str, Any]) -> bool:
    """Whether PEFT takes adapters in an order that is not that of their numbers."""
    order = spec["order"]
    return spec["given"] in ("paths", "outside") and [order[number] for number in order] != sorted(order)


def damage(spec: dict[str, Any], bundle: Path, folder: Path) -> None:
    """Put a bundle's adapters, which lie within it, where the spec has them, and break what it breaks."""
    file = bundle / "adapter_config.json"
    config = json.loads(file.read_text())
    if spec["given"].startswith(("outside", "gone", "saved")):
        for number in range(len(spec["adapters"])):
            shutil.copytree(bundle / str(number), folder / "outside" / f"expert {number}")
            if spec["given"] == "outside":
                shutil.rmtree(bundle / str(number))
    gone = "nowhere" if "gone" in spec["given"] else "outside"
    config["adapters"] = {
        name: path if spec["given"] == "paths" else str(folder / gone / f"expert {path}")
        for name, path in config["adapters"].items()
    }
    config["use_trainable_adapters"] = spec["given"] == "saved, trained"
    if spec["given"] == "none":
        config["adapters"] = None
    file.write_text(json.dumps(config))
    if spec["lost"].startswith("classifier"):
        tensors = load_file(bundle / "adapter_model.safetensors")
        last = f".layers.{3 * (spec['depth'] - 1)}."
        kept = {k: v for k, v in tensors.items() if spec["lost"] == "classifier layer" and last not in k}
        save_file(kept, bundle / "adapter_model.safetensors")
    if spec["lost"].startswith("expert"):
        for expert in [bundle / "1", folder / "outside" / "expert 1"]:
            if spec["lost"] == "expert":
                shutil.rmtree(expert, ignore_errors=True)
            elif expert.exists():
                tensors = load_file(expert / "adapter_model.safetensors")
                kept = dict(sorted(tensors.items())[2:])
                save_file(kept, expert / "adapter_model.safetensors")


@settings(QUICK, max_examples=25)
@given(spec=bundles())
def test_a_generated_bundle_computes_what_peft_computes_or_is_refused(base: Base, spec: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = {key: spec[key] for key in spec if key not in ("order", "given", "lost")}
        bundle = tiny_bundle(folder / "bundle", base.folder, **options)
        file = bundle / "adapter_config.json"
        config = json.loads(file.read_text())
        if spec["given"] in ("paths", "outside"):
            config["adapters"] = {str(number): str(number) for number in spec["order"]}
            file.write_text(json.dumps(config))
        oracle = peft_xlora(base.folder, bundle)
        expected = peft_logits(oracle, PROMPT)
        if spec["given"].startswith("saved"):
            whole = load_file(bundle / "adapter_model.safetensors")
            oracle.save_pretrained(bundle)  # damages the sub-folders, and the classifier, which is put back
            save_file(whole, bundle / "adapter_model.safetensors")
        damage(spec, bundle, folder)
        options = {"hidden_size": HIDDEN, "max_rank": 64, "base": BaseWeights(str(base.folder))}
        error = refusal(lambda: prepare_bundle(bundle, base.modules, folder / "out", **options))
        if error is not None:
            assert not (folder / "out").exists()
            odd = {spec["temperature"], spec["scaling_pass_value"], spec["global_scaling_weight"]} & {1e-40, 1e30}
            assert spec["lost"] or odd or spec["given"].startswith("saved, ") or shuffled(spec), error
            return
        found = reference_logits(base.model, folder / "out", PROMPT)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
