"""The plain checkpoint that is quantised: where its files are, and what must be known of it beforehand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xloom.mixtures.modules import linear_modules
from xloom.protocol import XloomError
from xloom.quantization.fitting import Weights
from xloom.quantization.recipes import Shapes
from xloom.settings import ModelSettings

FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class PlainModel:
    """A model in a local folder."""

    folder: Path
    dtype: str  # of its weights
    linears: Shapes  # the decoder's, which are quantised
    ignored: tuple[str, ...]  # other linears, such as lm_head
    weights: Weights


def plain_model(model: ModelSettings) -> PlainModel:
    """Look at a model, fetched from the hub when it is not a folder.

    Raises `XloomError`: model_not_loadable, unreadable_model, pickle_refused, already_quantised, isq_unsupported_model.
    """
    folder = _folder(model)
    config = _config(folder)
    text = config.get("text_config", config)
    if config.get("quantization_config"):
        raise XloomError(
            "already_quantised", f"{model.source} is quantised already.", "Leave isq out, or name the plain model."
        )
    if any(text.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise XloomError(
            "isq_unsupported_model",
            f"{model.source} is a mixture of experts, whose quantised kernels and smoothing are not done here.",
            "Leave isq out, or use a dense model.",
        )
    files = list(folder.glob("*.safetensors"))
    if not files:
        code = "pickle_refused" if any(file.suffix in PICKLES for file in folder.iterdir()) else "model_not_loadable"
        raise XloomError(code, f"{folder} has no safetensors weights.", "Save the model's weights as safetensors.")
    modules = linear_modules(str(folder))
    linears = {name: shape for name, shape in modules.items() if ".layers." in f".{name}."}
    if not linears:
        raise XloomError(
            "isq_unsupported_model",
            f"{model.source} has no linear layers in its decoder that could be quantised.",
            "Leave isq out, or use another model.",
        )
    count, dtype = _count(files)
    ours = sum(rows * columns for rows, columns in linears.values())
    return PlainModel(
        folder=folder,
        dtype=dtype,
        linears=linears,
        ignored=tuple(name for name in modules if name not in linears),
        weights=Weights(ours, max(count - ours, 0), DTYPE_BYTES[dtype]),
    )


def _folder(model: ModelSettings) -> Path:
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.source, revision=model.revision, allow_patterns=list(FILES)))
    except Exception as error:  # the hub's errors have no common class
        raise XloomError(
            "model_not_loadable",
            f"No model could be read from {model.source!r}: {error}",
            "Name a local folder with config.json and safetensors, or a hub id.",
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise XloomError(
            "model_not_loadable", f"{folder} has no readable config.json: {error}", "Name a complete model folder."
        ) from None
    return config


def _count(files: list[Path]) -> tuple[int, str]:
    """How many weights, and the dtype of most of them."""
    from safetensors import safe_open

    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    counts = dict.fromkeys(DTYPE_BYTES, 0)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(key)
                size = 1
                for length in part.get_shape():
                    size *= length
                dtype = names.get(part.get_dtype())
                if dtype is None:
                    raise XloomError(
                        "already_quantised",
                        f"{file} holds {key} as {part.get_dtype()}: it is not a plain checkpoint.",
                        "Leave isq out, or name the plain model.",
                    )
                counts[dtype] += size
    return sum(counts.values()), max(counts, key=lambda name: counts[name])
