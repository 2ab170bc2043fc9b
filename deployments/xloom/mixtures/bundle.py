"""X-LoRA bundles as they are on disk: PEFT's format and that of the xlora package (EricLBuehler/xlora)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.files import read_json, read_tensors
from xloom.mixtures.lora import LoraWeights, read_lora
from xloom.mixtures.options import MIXING_MODES, RoutingOptions
from xloom.protocol import XloomError

PROJECTION_FILE = "xlora_projection.safetensors"
_PEFT_CLASSIFIER = re.compile(r"(?:.*\.)?internal_xlora_classifier\.layers\.(\d+)\.(weight|bias)")
_XLORA_CLASSIFIER = re.compile(r"(inner\.\d+|last)\.(weight|bias)")
_COUNTED = re.compile(r"(.*?)(\d+)")  # adapter_1, adapter_2…: names of the xlora package's examples
_RESAVE = "Save the bundle anew."


@dataclass(frozen=True)
class Linear:
    """One layer of the classifier: weight `[out, in]`, bias `[out]` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Bundle:
    """An X-LoRA bundle: K adapters, the classifier that mixes them (ReLU between its layers), its options."""

    folder: Path
    adapter_names: tuple[str, ...]
    adapters: tuple[LoraWeights, ...]
    classifier: tuple[Linear, ...]  # float32
    hidden_size: int
    options: RoutingOptions
    projection: Mapping[str, torch.Tensor] | None  # module -> P [out, sum of ranks]; learned mixing, optional


def is_bundle(folder: Path) -> bool:
    """Whether the folder is an X-LoRA bundle, in either format (and not, say, a LoRA adapter)."""
    if (folder / "xlora_config.json").is_file():
        return True
    if not (folder / "adapter_config.json").is_file():
        return False
    return str(read_json(folder / "adapter_config.json", "broken_adapter").get("peft_type", "")).upper() == "XLORA"


def read_bundle(
    folder: Path, root: Path | None = None, modules: Collection[str] = (), base: BaseWeights | None = None
) -> Bundle:
    """Read a bundle with its adapters; `modules` and `base` as for `read_lora`.

    An adapter's path in the configuration may be relative to the bundle, and then stays inside `root` (by default the
    folder the bundle lies in), or absolute, which a given `root` confines too. Raises `XloomError`: broken_bundle,
    pickle_refused, and what `read_lora` raises for an adapter.
    """
    if not folder.is_dir():
        raise XloomError("broken_bundle", f"There is no bundle folder {folder}.", "Name an existing folder.")
    if (folder / "xlora_config.json").is_file():
        config = read_json(folder / "xlora_config.json", "broken_bundle")
        classifier = _xlora_classifier(folder, config)
    else:
        config = read_json(folder / "adapter_config.json", "broken_bundle")
        if str(config.get("peft_type", "")).upper() != "XLORA":
            message = f"{folder} is not an X-LoRA bundle: its adapter_config.json has no peft_type XLORA."
            raise XloomError("broken_bundle", message, "List a LoRA adapter under adapters instead.")
        classifier = _peft_classifier(folder, config)
    options, hidden_size = _options(folder, config)
    listed = _listed_adapters(folder, config)
    trained = bool(config.get("use_trainable_adapters", False))
    folders = [_adapter_folder(folder, number, name, path, root, trained) for number, (name, path) in enumerate(listed)]
    projection = None
    if (folder / PROJECTION_FILE).is_file():
        tensors = read_tensors(folder / PROJECTION_FILE, "broken_bundle")
        projection = {key.removesuffix(".weight"): tensor for key, tensor in tensors.items()}
    return Bundle(
        folder=folder,
        adapter_names=_called(listed),
        adapters=tuple(_adapter(folder, path, modules, base) for path in folders),
        classifier=classifier,
        hidden_size=hidden_size,
        options=options,
        projection=projection,
    )


def _options(folder: Path, config: Mapping[str, Any]) -> tuple[RoutingOptions, int]:
    try:
        top_k = config.get("top_k_lora")
        options = RoutingOptions(
            layerwise_scalings=bool(config.get("layerwise_scalings", False)),
            enable_softmax=bool(config.get("enable_softmax", True)),
            enable_softmax_topk=bool(config.get("enable_softmax_topk", False)),
            temperature=float(config.get("softmax_temperature", 1.0)),
            top_k=None if top_k is None else int(top_k),
            scaling_pass_value=float(config.get("scaling_pass_value", 0.0)),
            global_scaling_weight=float(config.get("global_scaling_weight", 1.0)),
            mixing_mode=str(config.get("mixing_mode") or "additive"),
        )
        hidden_size = int(config["hidden_size"])
        numbers = (options.temperature, options.scaling_pass_value, options.global_scaling_weight)
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a number is not finite")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise XloomError("broken_bundle", f"{folder}: the configuration is wrong: {error!r}.", _RESAVE) from None
    if options.mixing_mode not in MIXING_MODES:
        message = f"{folder}: mixing_mode {options.mixing_mode!r} is none of {', '.join(MIXING_MODES)}."
        raise XloomError("broken_bundle", message, "Mend the bundle's configuration.")
    if options.temperature <= 0:
        message = f"{folder}: softmax_temperature is {options.temperature}; it must be above 0."
        raise XloomError("broken_bundle", message, "Mend the bundle's configuration.")
    return options, hidden_size


def _listed_adapters(folder: Path, config: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Names and paths in the order of the classifier's columns."""
    adapters = config.get("adapters")
    if isinstance(adapters, dict) and adapters:
        listed = [(str(name), None if path is None else str(path)) for name, path in adapters.items()]
        peft = not (folder / "xlora_config.json").is_file()  # the xlora package keeps the order it was given
        return _by_number(folder, listed) if peft and all(name.isdecimal() for name, _ in listed) else listed
    if isinstance(adapters, list) and adapters:  # the xlora package's form, in the order of the columns
        if len(set(map(str, adapters))) != len(adapters):
            raise XloomError("broken_bundle", f"{folder} lists an adapter twice.", "List each adapter once.")
        return [(str(name), None) for name in adapters]
    # PEFT keeps adapters in numbered sub-folders; the xlora package in `adapters`, under the names they were given.
    for place in (folder, folder / "adapters"):
        names = [entry.name for entry in place.glob("*") if (entry / "adapter_config.json").is_file()]
        names = [name for name in names if name.isdecimal()] or names
        if names:
            return [(name, None) for name in _counted(folder, names)]
    message = f"{folder} names no adapters and has no numbered sub-folders."
    raise XloomError("broken_bundle", message, 'List them in the configuration\'s "adapters".')


def _called(listed: Sequence[tuple[str, str | None]]) -> tuple[str, ...]:
    """What people call the adapters: by their folders where PEFT has numbers for names, if that tells them apart."""
    names = [name for name, _ in listed]
    folders = [PurePath(path or name).name or name for name, path in listed]
    numbered = all(name.isdecimal() for name in names)
    readable = len(set(folders)) == len(names) and not any(folder.isdecimal() for folder in folders)
    return tuple(folders if numbered and readable else names)


def _by_number(folder: Path, listed: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Adapters named by number, in their columns' order.

    PEFT sorts the keys as text when it saves, so "10" comes before "2"; the classifier's columns are numeric. Given
    keys in another order, PEFT (0.21, XLoraModel) loads the i-th under the name i and takes the columns in the keys'
    order. Where both readings differ, nothing says which of them the classifier was trained with.
    """
    names = [name for name, _ in listed]
    numeric = sorted(listed, key=lambda entry: int(entry[0]))
    if names == sorted(names) or names == [name for name, _ in numeric]:
        return numeric
    if sorted(map(int, names)) == list(range(len(names))) and [listed[int(name)] for name in names] == numeric:
        return numeric
    message = f"{folder}: its adapters are numbered in the order {', '.join(names)}, which PEFT shuffles."
    raise XloomError("broken_bundle", message, 'List them as "0", "1", … in the order of the classifier\'s columns.')


def _counted(folder: Path, names: list[str]) -> list[str]:
    """Sub-folders whose names end in consecutive numbers, from 0 or 1, by number. Raises `XloomError` for others."""
    numbers = {int(match[2]): name for name in names if (match := _COUNTED.fullmatch(name))}
    stems = {match[1] for name in names if (match := _COUNTED.fullmatch(name))}
    first = min(numbers, default=0)
    if len(stems) == 1 and first in (0, 1) and sorted(numbers) == list(range(first, first + len(names))):
        return [numbers[number] for number in sorted(numbers)]
    message = f"{folder} does not say in which order its adapters {', '.join(sorted(names))[:200]} come."
    raise XloomError("broken_bundle", message, "List them in the configuration's \"adapters\", in the columns' order.")


def _adapter_folder(folder: Path, number: int, name: str, path: str | None, root: Path | None, trained: bool) -> Path:
    """Where an adapter lies: at its path, as PEFT has it, but inside the bundle where it was `trained` with it."""
    bundle = folder.resolve()
    place = bundle / (name if name.isdecimal() else str(number))
    named = [bundle / "adapters" / name, bundle / name]  # what a path leads to is fetched to the first
    inside = [place, *named] if trained or (name.isdecimal() and path is None) else [*named, place]
    found = None
    if path is not None:
        written = Path(path)
        resolved = (written if written.is_absolute() else bundle / written).resolve()
        limit = root.resolve() if root is not None else None if written.is_absolute() else bundle.parent
        escapes = limit is not None and not resolved.is_relative_to(limit)
        if escapes and ".." in written.parts:
            message = f"{folder}: the path of adapter {name!r}, {path!r}, leads out of {limit}."
            raise XloomError("broken_bundle", message, "Keep a bundle's adapters beside it or inside it.")
        found = resolved if not escapes and resolved.is_dir() else None
        if found and not trained:
            return found
    for candidate in inside:
        if (candidate / "adapter_config.json").is_file() and candidate.resolve().is_relative_to(bundle):
            return candidate
    if found:
        return found
    raise XloomError(
        "broken_bundle",
        f"{folder}: the folder of adapter {name!r} is missing ({path or place.name}).",
        f"Put the adapter into the bundle as sub-folder {place.name}, or mend its path in the configuration.",
    )


def _adapter(folder: Path, path: Path, modules: Collection[str], base: BaseWeights | None) -> LoraWeights:
    try:
        return read_lora(path, modules, base, in_bundle=True)
    except XloomError as error:
        if error.code == "pickle_refused" or not _saved_by_peft(path):
            raise
        cure = (
            "PEFT's save_pretrained damages the adapters that it saves with an X-LoRA model: put the folders they were "
            "trained in in place of the bundle's own sub-folders."
        )
        raise XloomError(error.code, error.message, cure) from None


def _saved_by_peft(path: Path) -> bool:
    """Whether a folder is one that PEFT saved with an X-LoRA model: it holds tensors of the model around it."""
    tensors = read_tensors(path / "adapter_model.safetensors", "broken_adapter")
    return any("internal_xlora_classifier." in key or key.startswith("base_model.lora_model.") for key in tensors)


def _linears(folder: Path, layers: Mapping[Any, Mapping[str, torch.Tensor]], order: list[Any]) -> list[Linear]:
    linears = []
    for key in order:
        weight, bias = layers[key].get("weight"), layers[key].get("bias")
        if weight is None or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            message = f"{folder}: layer {key} of the classifier is not a weight [out, in] and a bias [out]."
            raise XloomError("broken_bundle", message, _RESAVE)
        linears.append(Linear(weight.float(), None if bias is None else bias.float()))
    for first, second in itertools.pairwise(linears):
        if second.weight.shape[1] != first.weight.shape[0]:
            message = (
                f"{folder}: a classifier layer takes {second.weight.shape[1]} values and gets {first.weight.shape[0]}."
            )
            raise XloomError("broken_bundle", message, _RESAVE)
    return linears


def _peft_classifier(folder: Path, config: Mapping[str, Any]) -> tuple[Linear, ...]:
    """peft.tuners.xlora.classifier.XLoraClassifier: `layers` is a Sequential of Linear, ReLU, (Dropout)."""
    tensors = read_tensors(folder / "adapter_model.safetensors", "broken_bundle")
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _PEFT_CLASSIFIER.fullmatch(key)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    depth = config.get("xlora_depth") or len(layers)
    if 0 not in layers or len(layers) != depth:
        # PEFT >= 0.20 drops, on saving, the classifier tensors whose layer number equals an adapter's name ("0").
        raise XloomError(
            "broken_bundle",
            f"{folder / 'adapter_model.safetensors'} lacks layers of the classifier: it holds "
            f"{', '.join(map(str, sorted(layers))) or 'none'}, and its depth is {depth}. PEFT 0.20 and later drop some "
            "when they save an X-LoRA model.",
            "Save it with PEFT 0.19, or write model.base_model.internal_xlora_classifier.state_dict() into the file "
            "yourself with the prefix base_model.internal_xlora_classifier.; keep the adapters' own folders.",
        )
    return tuple(_linears(folder, layers, sorted(layers)))


def _xlora_classifier(folder: Path, config: Mapping[str, Any]) -> tuple[Linear, ...]:
    """xlora.xlora_classifier.xLoRAClassifier: `inner` is a ModuleList of Linear, (ReLU, Dropout); `last` a Linear."""
    tensors = read_tensors(folder / "xlora_classifier.safetensors", "broken_bundle")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _XLORA_CLASSIFIER.fullmatch(key)
        if match is None:
            raise XloomError("broken_bundle", f"{folder}: the classifier has an unknown tensor {key}.", _RESAVE)
        layers.setdefault(match[1], {})[match[2]] = tensor
    if "last" not in layers:
        raise XloomError("broken_bundle", f"{folder}: the classifier has no last layer.", _RESAVE)
    inner = sorted((key for key in layers if key != "last"), key=lambda key: int(key.split(".")[1]))
    linears = _linears(folder, layers, [*inner, "last"])
    return tuple(linears if config.get("enable_relu_and_dropout", False) else [_fold(linears)])


def _fold(linears: list[Linear]) -> Linear:
    """Linear layers with nothing between them are one linear layer; folded in float64."""
    weight, bias = linears[0].weight.double(), linears[0].bias
    total = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()
    for linear in linears[1:]:
        weight, total = linear.weight.double() @ weight, linear.weight.double() @ total
        total = total if linear.bias is None else total + linear.bias.double()
    return Linear(weight.float(), total.float())
