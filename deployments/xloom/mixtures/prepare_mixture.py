"""Prepares mixtures made of adapters alone, or with a learned linear router: the kinds that take one row a token."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.general_knowledge import without_general
from xloom.mixtures.linear_router import load_linear_router
from xloom.mixtures.lora import LoraWeights, read_lora
from xloom.mixtures.options import ROUTER_FILE, XLORA_FILE
from xloom.mixtures.overflow import check_range
from xloom.mixtures.routing.arrow import ArrowRouting, prototypes
from xloom.mixtures.routing.fixed import FixedRouting
from xloom.mixtures.routing.inputs import with_absent
from xloom.mixtures.routing.linear import LinearRouting
from xloom.mixtures.stacking import Prepared, Shapes, Stack, check_adapters, stacked, write_json, write_mixture
from xloom.mixtures.weights import LARGEST, MOST_ADAPTERS, checked_weights
from xloom.protocol import Blend, XloomError

MIXED = (ArrowRouting.kind, FixedRouting.kind)  # the kinds that a `Blend` names

Routers = dict[str, tuple[Tensor, Tensor]]


def prepare_mixture(
    blend: Blend,
    folders: Mapping[str, Path],
    modules: Shapes,
    out: Path,
    *,
    max_rank: int,
    base: BaseWeights | None = None,
) -> Prepared:
    """Stack the adapters in `folders`, by name, and write them to `out` with the routing that `blend` says.

    Those that `blend` subtracts are among the folders.

    Raises `XloomError`: invalid_mixture, invalid_weights, rank_too_large, and what reading an adapter raises.
    """
    mixed = {name: folder for name, folder in folders.items() if name not in blend.subtract or name in blend.adapters}
    names = tuple(mixed)
    _check_blend(blend, names)
    adapters = [read_lora(folder, modules, base) for folder in mixed.values()]
    if blend.subtract:
        general = {name: read_lora(folders[name], modules, base) for name in blend.subtract}
        adapters = [without_general(name, each, general) for name, each in zip(names, adapters, strict=True)]
    stack = _stack(", ".join(names), names, adapters, modules, max_rank)
    if blend.routing == FixedRouting.kind:
        weights = checked_weights(blend.weights or dict.fromkeys(names, 1 / len(names)), names, "the mixture")
        _check_range(stack, LARGEST)
        write_mixture(out, stack, {"weights": list(weights)}, FixedRouting.kind)
    else:
        _check_range(stack, 1.0)
        options = {"activation": "softmax", "top_k": blend.top_k, "temperature": blend.temperature or 1.0}
        _write_routers(out, stack, dict(zip(stack.modules, prototypes(stack, adapters), strict=True)))
        write_mixture(out, stack, options, ArrowRouting.kind)
    return Prepared.of(out, stack.rank, stack.tensors)


def prepare_request_mixture(folders: Mapping[str, Path], modules: Shapes, out: Path, *, max_rank: int) -> Prepared:
    """Stack prepared adapters, by name, for requests that bring the weights; one alone is a mixture, too.

    Raises `XloomError`: rank_too_large, before any weights are read, and what reading an adapter raises.
    """
    names = tuple(folders)
    _check_count(len(names))
    if (rank := stacked_rank(folders.values())) > max_rank:
        what = f"The ranks of {', '.join(names)} add up to {rank}; these engines take up to {max_rank}."
        cure = "Name fewer adapters, or have the operator raise engine.max_lora_rank and store.max_rank."
        raise XloomError("rank_too_large", what, cure)
    adapters = [read_lora(folder, modules) for folder in folders.values()]
    stack = _stack(", ".join(names), names, adapters, modules, max_rank)
    _check_range(stack, LARGEST)
    write_mixture(out, stack, {"weights": [1 / len(names)] * len(names)}, FixedRouting.kind)
    return Prepared.of(out, stack.rank, stack.tensors)


def with_constant_gates(prepared: Path, out: Path) -> Prepared:
    """A prepared mixture of any kind as one of constants, which requests bring: the same stack, without its router.

    Raises `XloomError` (broken_bundle) where a weight could overflow.
    """
    description = json.loads((prepared / XLORA_FILE).read_text(encoding="utf-8"))
    count = int(description["num_adapters"])
    tensors = read_lora(prepared).tensors
    check_range(Path("the mixture"), "broken_bundle", {name: (a, b, 1.0) for name, (a, b) in tensors.items()}, LARGEST)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(prepared / name, out / name)
    described = description | {"kind": FixedRouting.kind, "routing": {"weights": [1 / count] * count}}
    write_json(out / XLORA_FILE, described)
    ranks = [sum(rank for _, rank in segment) for segment in description["segments"]]
    return Prepared.of(out, max(ranks), description["modules"])


def stacked_rank(folders: Iterable[Path]) -> int:
    """The largest sum of ranks at one linear that prepared adapters come to, by their files' headers."""
    ranks: Counter[str] = Counter()
    for folder in folders:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name.endswith(".lora_A.weight"):
                    ranks[name] += file.get_slice(name).get_shape()[0]
    return max(ranks.values(), default=0)


def prepare_linear(
    folder: Path,
    modules: Shapes,
    out: Path,
    *,
    max_rank: int,
    root: Path | None = None,
    base: BaseWeights | None = None,
) -> Prepared:
    """Stack the adapters of a learned linear router, and write them to `out` with it.

    Adapters' paths may be relative to the folder, and lie within `root` if it is given. Raises `XloomError`:
    broken_bundle, rank_too_large, and what reading the router and an adapter raises.
    """
    router = load_linear_router(folder)
    _check_count(len(router.adapters))
    adapters = [read_lora(_inside(folder, name, path, root), modules, base) for name, path in router.adapters.items()]
    stack = _stack(folder, tuple(router.adapters), adapters, modules, max_rank)
    if missing := [name for name in stack.modules if name not in router.layers]:
        message = f"{folder}: the router has no weights for {missing[0]}, which its adapters adapt."
        raise XloomError("broken_bundle", message, "Train it for these adapters.")
    for name in stack.modules:
        if router.layers[name][0].shape[1] != modules[name][1]:
            message = f"{folder}: the router takes {router.layers[name][0].shape[1]} values at {name}, not "
            raise XloomError("broken_bundle", f"{message}{modules[name][1]}.", "Use one trained on this base model.")
    _check_range(stack, 1.0)
    options = {"activation": router.activation, "top_k": router.top_k, "temperature": router.temperature}
    _write_routers(out, stack, {name: router.layers[name] for name in stack.modules})
    write_mixture(out, stack, options, LinearRouting.kind)
    return Prepared.of(out, stack.rank, stack.tensors)


def _check_blend(blend: Blend, names: tuple[str, ...]) -> None:
    if blend.routing not in MIXED:
        raise _invalid(f"routing {blend.routing!r} is none of {', '.join(MIXED)}")
    if len(names) < 2:
        raise _invalid(f"a mixture of {len(names)} adapters is none")
    _check_count(len(names))
    arrow = blend.routing == ArrowRouting.kind
    if arrow and blend.weights:
        raise _invalid("weights are for routing fixed")
    if not arrow and blend.subtract:
        raise _invalid("subtract is for routing arrow")
    if not arrow and (blend.top_k is not None or blend.temperature is not None):
        raise _invalid("top_k and temperature are for routing arrow")
    if blend.top_k is not None and not 1 <= blend.top_k <= len(names):
        raise _invalid(f"top_k is {blend.top_k}, of {len(names)} adapters")
    if blend.temperature is not None and not (math.isfinite(blend.temperature) and blend.temperature > 0):
        raise _invalid(f"temperature is {blend.temperature}; it must be above 0")


def _check_count(count: int) -> None:
    if count > MOST_ADAPTERS:
        raise _invalid(f"{count} adapters are more than {MOST_ADAPTERS}")


def _stack(
    mixture: str | Path, names: tuple[str, ...], adapters: list[LoraWeights], modules: Shapes, max_rank: int
) -> Stack:
    check_adapters(adapters, modules, max_rank)
    return stacked(mixture, names, adapters, modules, max_rank=max_rank)


def _check_range(stack: Stack, gate: float) -> None:
    matrices = {name: (a, b, 1.0) for name, (a, b) in stack.tensors.items()}
    check_range(Path("the mixture"), "broken_bundle", matrices, gate)


def _write_routers(out: Path, stack: Stack, routers: Routers) -> None:
    tensors = {}
    for name, segment in zip(stack.modules, stack.segments, strict=True):
        weight, bias = routers[name]
        tensors[f"{name}.router.weight"] = weight.float().contiguous()
        tensors[f"{name}.router.bias"] = with_absent(bias.float(), segment)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / ROUTER_FILE, metadata={"format": "pt"})


def _inside(folder: Path, name: str, path: str, root: Path | None) -> Path:
    """Where an adapter of a router lies: at its path, or in the sub-folder that has its name."""
    bundle = folder.resolve()
    written = Path(path)
    resolved = (written if written.is_absolute() else bundle / written).resolve()
    limit = bundle.parent if root is None else root.resolve()
    allowed = resolved.is_relative_to(limit) or (root is None and written.is_absolute())
    for place in [resolved] * allowed + [bundle / "adapters" / name, bundle / name]:
        if (place / "adapter_config.json").is_file() and (place == resolved or place.resolve().is_relative_to(bundle)):
            return place
    message = f"{folder}: the folder of adapter {name!r} is missing ({path})."
    cure = "Put the adapter beside the router, or mend its path in router_config.json."
    raise XloomError("broken_bundle", message, cure)


def _invalid(what: str) -> XloomError:
    return XloomError("invalid_mixture", f"The mixture can't be made: {what}.", "See docs/mixtures.md.")
