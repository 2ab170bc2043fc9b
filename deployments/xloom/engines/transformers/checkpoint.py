"""A checkpoint held against the model it is of: what it lacks, and what of it has no place. Transformers 5.19."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom.protocol import XloomError, some_of

if TYPE_CHECKING:
    from xloom.settings import ModelSettings

logger = logging.getLogger(__name__)

# Of a quantised linear: what stands for its weight, and what comes with that.
WEIGHTS = ("weight_packed", "qweight")
PARTS = (
    "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_global_scale", "input_zero_point", "scales", "qzeros", "g_idx", "k_scale", "v_scale",
)  # fmt: skip


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Within it, what Transformers raises for a model it can't read is raised as `XloomError` (model_not_loadable)."""
    try:
        yield
    except RuntimeError as error:
        raise unfit(source, error) from error
    except (OSError, ValueError, ImportError, KeyError) as error:
        cure = "Name a local folder with config.json and safetensors, or a hub id."
        raise XloomError("model_not_loadable", f"No model could be read from {source!r}: {error}", cure) from error


def read_model(model: ModelSettings, **options: Any) -> Any:
    """A causal language model with all its weights, from safetensors; `options` are those of `from_pretrained`.

    Raises `XloomError` (model_not_loadable).
    """
    from transformers import AutoModelForCausalLM

    with reading(model.source):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model.source,
            revision=model.revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    refuse_missing(model.source, info)
    return loaded


def refuse_missing(source: str, info: Mapping[str, Collection[Any]]) -> None:
    """Read what `from_pretrained(output_loading_info=True)` says: a weight it had to make up is refused.

    Logs what has no place in the model. Raises `XloomError` (model_not_loadable).
    """
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise XloomError(
            "model_not_loadable",
            f"The checkpoint of {source} lacks {len(missing)} of the model's weights: {some_of(missing)}.",
            "The model's weights are missing or damaged: download it again, as safetensors.",
        )
    if extra := sorted(map(str, info["unexpected_keys"])):
        logger.warning("%d tensors of %s have no place in the model: %s", len(extra), source, some_of(extra))


def loading_info(folder: Path) -> Mapping[str, Collection[Any]]:
    """What `from_pretrained` would say of a local safetensors checkpoint, by its files' headers alone.

    Relied on: `PreTrainedModel.from_pretrained(None, config=..., state_dict=...)` takes meta tensors. Raises
    `XloomError` (model_not_loadable) where they don't fit the model, and whatever Transformers raises for a model it
    can't make.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised:
        del config.quantization_config
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    info: Mapping[str, Collection[Any]]
    try:
        with _quiet():
            _, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=_headers(folder, quantised),
                device_map="meta",
                ignore_mismatched_sizes=quantised,
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise unfit(str(folder), error) from None
    return info


def unfit(source: str, error: RuntimeError) -> XloomError | RuntimeError:
    """Of tensors with other shapes than the model's, or too few to make one of its own from; else the error itself."""
    if not re.search(r"conversion of the weights|mismatch", str(error)):
        return error
    return XloomError(
        "model_not_loadable",
        f"The checkpoint of {source} does not fit its model: {' '.join(str(error).split())}",
        "The model's weights are missing or damaged: download it again, as safetensors.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' own report and its bar."""
    from transformers.utils import logging as theirs

    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()


def _headers(folder: Path, quantised: bool) -> dict[str, Any]:
    """Every tensor of a checkpoint, on the meta device."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import _TYPES

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                place, _, own = name.rpartition(".")
                if quantised and own in PARTS:
                    continue
                key = f"{place}.weight" if quantised and own in WEIGHTS else name
                part = tensors.get_slice(name)
                found[key] = torch.empty(part.get_shape(), dtype=_TYPES[part.get_dtype()], device="meta")
    return found
