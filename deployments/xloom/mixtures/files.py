"""Reading the JSON and safetensors files of adapters and bundles without trusting them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from xloom.protocol import XloomError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors")
# Every value of these is one of bfloat16 too. PEFT (0.21) computes adapters saved in them in float32.
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_FLOAT8)


def read_json(file: Path, code: str) -> dict[str, Any]:
    """The JSON object in `file`, in UTF-8 with or without a byte-order mark.

    Raises `XloomError` with `code` when it is missing or is not one.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise XloomError(code, f"{file.parent} has no {file.name}.", "Give a complete folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise XloomError(code, f"{file} is not readable JSON: {error}.", "Write the file anew.") from None
    if not isinstance(data, dict):
        raise XloomError(code, f"{file} must hold a JSON object.", "Write the file anew.")
    return data


def read_tensors(file: Path, code: str) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, or in the shards `stem-00001-of-00003` of it, on the CPU.

    float8 becomes bfloat16. Raises `XloomError`: `pickle_refused` when the folder has pickled weights in its place,
    else `code` when the file or a shard is missing, cut short, or holds values that are not finite floats.
    """
    tensors: dict[str, torch.Tensor] = {}
    for part in [file] if file.is_file() else _shards(file, code):
        try:
            found = load_file(part)
        except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as error:
            raise XloomError(code, f"{part} is not a readable safetensors file: {error}.", "Save it anew.") from None
        if twice := sorted(set(found) & set(tensors)):
            raise XloomError(code, f"{part}: {twice[0]} is in another shard too.", "Save it anew.")
        for name, tensor in found.items():
            tensors[name] = _finite(part, name, tensor, code)
    return tensors


def _finite(file: Path, name: str, tensor: torch.Tensor, code: str) -> torch.Tensor:
    if tensor.dtype not in _FLOATS:
        raise XloomError(code, f"{file}: {name} holds {tensor.dtype}, not floats.", "Save unquantised weights.")
    if tensor.dtype in _FLOAT8:
        tensor = tensor.to(torch.bfloat16)
    if not torch.isfinite(tensor).all():
        raise XloomError(code, f"{file}: {name} holds NaN or infinite values.", "Train or save it anew.")
    return tensor


def _shards(file: Path, code: str) -> list[Path]:
    """The shards of a file that is not there itself: all that their names count, and all that the index names."""
    counted = {entry: _SHARD.fullmatch(entry.name.removeprefix(file.stem)) for entry in file.parent.glob("*")}
    found = {entry: match for entry, match in counted.items() if match and entry.name.startswith(file.stem)}
    if not found:
        pickles = sorted(entry.name for entry in file.parent.glob("*") if entry.suffix in PICKLES)
        if pickles:
            raise XloomError(
                "pickle_refused",
                f"{file.parent} holds pickled weights ({', '.join(pickles)}) and no {file.name}.",
                "Pickle can run code when it is loaded; save the weights as safetensors.",
            )
        raise XloomError(code, f"{file.parent} has no {file.name}.", "Give a complete folder.")
    total = max(int(match[2]) for match in found.values())
    wanted = {f"{file.stem}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)}
    index = file.with_name(f"{file.name}.index.json")
    if index.is_file():
        named = read_json(index, code).get("weight_map")
        wanted |= set(map(str, named.values())) if isinstance(named, dict) else set()
    if odd := sorted(wanted ^ {entry.name for entry in found}):
        message = f"{file.parent}: the shards of {file.name} do not make a whole: {', '.join(odd[:3])}."
        raise XloomError(code, message, "Give all shards of one save, and no others.")
    return sorted(found)
