"""Reading the JSON and safetensors files of adapters and bundles without trusting them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from xloom.protocol import XloomError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def read_json(file: Path, code: str) -> dict[str, Any]:
    """The JSON object in `file`. Raises `XloomError` with `code` when it is missing or is not one."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise XloomError(code, f"{file.parent} has no {file.name}.", "Give a complete folder.") from None
    except (OSError, ValueError) as error:
        raise XloomError(code, f"{file} is not readable JSON: {error}.", "Write the file anew.") from None
    if not isinstance(data, dict):
        raise XloomError(code, f"{file} must hold a JSON object.", "Write the file anew.")
    return data


def read_tensors(file: Path, code: str) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, on the CPU.

    Raises `XloomError`: `pickle_refused` when the folder has pickled weights in its place, else `code` when the
    file is missing, cut short, or holds values that are not finite.
    """
    if not file.is_file():
        pickles = sorted(entry.name for entry in file.parent.glob("*") if entry.suffix in PICKLES)
        if pickles:
            raise XloomError(
                "pickle_refused",
                f"{file.parent} holds pickled weights ({', '.join(pickles)}) and no {file.name}.",
                "Pickle can run code when it is loaded; save the weights as safetensors.",
            )
        raise XloomError(code, f"{file.parent} has no {file.name}.", "Give a complete folder.")
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise XloomError(code, f"{file} is not a readable safetensors file: {error}.", "Save it anew.") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise XloomError(code, f"{file}: {name} holds {tensor.dtype}, not floats.", "Save unquantised weights.")
        if not torch.isfinite(tensor).all():
            raise XloomError(code, f"{file}: {name} holds NaN or infinite values.", "Train or save it anew.")
    return tensors
