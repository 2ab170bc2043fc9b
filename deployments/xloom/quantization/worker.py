"""Quantise one model: `python -m xloom.quantization.worker JOB.json`, with llmcompressor's folder first on the path.

Progress goes to standard output, one JSON object a line; all that libraries say goes to standard error. The process
ends when its standard input closes, which it does when its parent dies.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from xloom.protocol import XloomError
from xloom.quantization import calibration, fidelity
from xloom.quantization.feeding import Fold, cancelling, logits, norm_folds
from xloom.quantization.folding import FOLDING_FILE
from xloom.quantization.job import Job, read_job
from xloom.quantization.layers import check_layers

BATCH = 8  # windows
SAMPLE = 16  # tokens
FOLDED_APART, NARROW_APART = 0.01, 0.1  # of the largest logit, in float32 and in 16 bits
TEXT_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # what a tokenizer may be made of
WRITTEN = ("config.json",)  # and the weights with their index: not the source's any more


class Progress:
    """What is done, told to the parent."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._done, self._total = 0, 0

    def stage(self, name: str, total: int = 0) -> None:
        """A new stage, of `total` parts."""
        self._done, self._total = 0, total
        self._write(name)

    def part(self, name: str) -> None:
        """One part of a stage is done."""
        self._done += 1
        self._write(name)

    def refuse(self, error: XloomError) -> None:
        """It is not done, for a reason that the user can act on."""
        self._stream.write(json.dumps({"error": [error.code, error.message, error.cure, error.status]}) + "\n")
        self._stream.flush()

    def _write(self, stage: str) -> None:
        done = min(self._done, self._total)
        self._stream.write(json.dumps({"stage": stage, "done": done, "total": self._total}) + "\n")
        self._stream.flush()


def end_with_parent() -> None:
    """End this process when its standard input closes."""

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock a normal exit would wait for
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def own_stdout() -> TextIO:
    """The real standard output; what others print goes to standard error from now on."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def load(job: Job) -> Any:
    """The plain model: in float32 on CPU, where narrow arithmetic is slow and coarse, else in its own dtype."""
    from transformers import AutoModelForCausalLM

    wide = job.device == "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32 if wide else "auto", use_safetensors=True, trust_remote_code=False
    )
    model.eval()
    return model


def batches(job: Job) -> list[dict[str, Tensor]]:
    """The calibration windows, by batch. Raises `XloomError` (no_calibration)."""
    from transformers import AutoConfig, AutoTokenizer

    text = AutoConfig.from_pretrained(job.model, trust_remote_code=False).get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or calibration.LENGTH
    tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    texts = calibration.documents(job.calibration, held_out=False)
    length = min(calibration.LENGTH, positions)
    windows = calibration.windows(texts, calibration.encoder(tokenizer), job.samples, length)
    if not any(windows):
        raise no_text(job.calibration)
    made = []
    for start in range(0, len(windows), BATCH):
        rows = windows[start : start + BATCH]
        length = min(len(row) for row in rows)
        ids = torch.tensor([row[:length] for row in rows])
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made


def reference(job: Job, model: Any) -> fidelity.Reference:
    """What the plain model makes of text that no calibration has seen, where there is such text."""
    from transformers import AutoTokenizer

    encode = calibration.encoder(AutoTokenizer.from_pretrained(job.model, trust_remote_code=False))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or fidelity.LENGTH
    named = job.calibration if job.recipe.calibrates else calibration.SAMPLE
    for held_out in (True, False):
        texts = calibration.documents(named, held_out=held_out)
        ids = fidelity.reference_ids(texts, encode, min(fidelity.LENGTH, positions))
        if ids is not None:
            return fidelity.reference(model, ids, job.recipe, job.groups, job.ignore)
    raise no_text(named)


def no_text(named: str) -> XloomError:
    """Of a calibration text in which the tokenizer finds nothing."""
    return XloomError(
        "no_calibration",
        f"isq.calibration {named!r} is no text to the model's tokenizer.",
        "Name a file with more text, or sample.",
    )


def modifiers(job: Job, model: Any, data: list[dict[str, Tensor]]) -> list[Any]:
    """llmcompressor's modifiers for the recipe; llmcompressor 0.14."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    recipe = job.recipe
    groups = {}
    for number, (size, targets) in enumerate(job.groups):
        strategy = {"strategy": "group", "group_size": size} if recipe.grouped else {"strategy": "channel"}
        groups[f"group_{number}"] = QuantizationScheme(
            targets=targets,
            weights=QuantizationArgs(num_bits=recipe.bits, symmetric=recipe.symmetric, **strategy),
            input_activations=None
            if recipe.activation_bits is None
            else QuantizationArgs(num_bits=recipe.activation_bits, strategy="token", dynamic=True),
        )
    options: dict[str, Any] = {"config_groups": groups, "ignore": job.ignore}
    if recipe.bits == 2:
        options["weight_observer"] = "memoryless_mse"  # of four levels none can be spent on a lone outlier
    if recipe.method == "gptq":
        return [GPTQModifier(**options)]
    rounding = QuantizationModifier(**options)
    if recipe.method == "awq":
        return [AWQModifier(), rounding]
    if recipe.method == "smoothquant":
        # Not the library's own mappings, which go by names: Gemma's post_attention_layernorm feeds no linear.
        folds = norm_folds(model, sample(data), job.ignore)
        if not folds:
            raise ValueError("SmoothQuant: no norm of this model feeds linears alone. Use isq.method gptq or rtn.")
        return [SmoothQuantModifier(mappings=[(list(fold.behind), fold.smooth) for fold in folds]), rounding]
    return [rounding]


def sample(data: list[dict[str, Tensor]]) -> Tensor:
    """A few tokens `[1, SAMPLE]` to run the model on."""
    return data[0]["input_ids"][:1, :SAMPLE]


def keep_cancelling(model: nn.Module, ids: Tensor) -> None:
    """Have AWQ fold only where a fold leaves the model as it is; its mappings go by names.

    Relied on: AWQModifier._set_resolved_mappings, ._resolved_mappings; llmcompressor 0.14.
    """
    from llmcompressor.modifiers.transform.awq import AWQModifier

    resolve = AWQModifier._set_resolved_mappings

    def resolve_cancelling(modifier: Any, resolved: Any) -> None:
        resolve(modifier, resolved)
        folds = [Fold(each.smooth_name, tuple(each.balance_names)) for each in modifier._resolved_mappings]
        kept = set(cancelling(model, ids, folds))
        pairs = zip(folds, modifier._resolved_mappings, strict=True)
        modifier._resolved_mappings = [mapping for fold, mapping in pairs if fold in kept]

    AWQModifier._set_resolved_mappings = resolve_cancelling


class Folds:
    """The scales that modifiers fold from one layer into the next, as they choose them.

    Relied on: AWQModifier._compute_best_scale and SmoothQuantModifier._calculate_smoothing_scales give the scale by
    which the smooth layer's output is divided and the weights behind it are multiplied; llmcompressor 0.14.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._norms = {name: gain.clone() for name, gain in self._gains()}
        self._found: list[tuple[str, list[str], Tensor]] = []  # smooth layer, layers behind it, scale

    def _gains(self) -> Iterable[tuple[str, Tensor]]:
        """What each norm multiplies by."""
        from llmcompressor.modeling.offset_norm import NormCalibrationModule, _is_registered

        for name, module in self._model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1:
                offset = 1.0 if _is_registered(type(module).__name__, NormCalibrationModule) else 0.0
                yield name, weight.detach().float() + offset

    def record(self) -> None:
        """Listen from now on."""
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
        from llmcompressor.modifiers.transform.smoothquant.base import MINIMUM_SMOOTHING_SCALE

        best, smoothing = AWQModifier._compute_best_scale, SmoothQuantModifier._calculate_smoothing_scales

        def awq(modifier: Any, mapping: Any, *args: Any) -> Tensor:
            scale: Tensor = best(modifier, mapping, *args)
            self._found.append((mapping.smooth_name, list(mapping.balance_names), scale.float().cpu()))
            return scale

        def smoothquant(modifier: Any, layers: Sequence[nn.Module], *args: Any) -> Tensor:
            scale: Tensor = smoothing(modifier, layers, *args)
            mapping = next(each for each in modifier.resolved_mappings_ if each.balance_layers is layers)
            kept = scale.float().cpu().clamp(min=MINIMUM_SMOOTHING_SCALE)
            self._found.append((mapping.smooth_name, [self._names[layer] for layer in layers], kept))
            return scale

        AWQModifier._compute_best_scale = awq
        SmoothQuantModifier._calculate_smoothing_scales = smoothquant

    def tensors(self) -> dict[str, Tensor]:
        """`<module>.input` and `<module>.output` of every linear where they are not 1: see folding.py."""
        now = dict(self._gains())
        found: dict[str, Tensor] = {}
        for smooth, behind, scale in self._found:
            if smooth in now:  # the norm's own ratio, so that rounding of the folded norm is made up for as well
                ratio = self._norms[smooth].cpu() / now[smooth].cpu()
                scale = torch.where(torch.isfinite(ratio) & (ratio != 0), ratio, scale)
            else:
                rows = self._model.get_parameter(f"{smooth}.weight").shape[0]
                out = torch.ones(rows)
                out[-len(scale) :] = scale  # of a fused projection AWQ scales the last rows
                found[f"{smooth}.output"] = out
            for name in behind:
                found[f"{name}.input"] = scale.clone()
        return found


def quantise(job: Job, model: Any, data: list[dict[str, Tensor]], progress: Progress) -> Folds:
    """Calibrate and quantise in memory; returns what was folded meanwhile."""
    from llmcompressor import oneshot
    from llmcompressor.core import LifecycleCallbacks
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader

    if not torch.cuda.is_available():
        # AWQModifier._apply_smoothing pins its cached inputs for copies to a GPU; without one torch refuses.
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    ended = LifecycleCallbacks.sequential_epoch_end

    def epoch_end(modules: Any, **kwargs: Any) -> Any:
        result = ended(modules, **kwargs)
        progress.part("quantise")
        return result

    LifecycleCallbacks.sequential_epoch_end = epoch_end
    folds = Folds(model)
    folds.record()
    if job.recipe.method == "awq":
        keep_cancelling(model, sample(data))
    recipe = modifiers(job, model, data)
    plain = logits(model, sample(data)) if job.recipe.smooths else None
    layers = model.config.num_hidden_layers
    progress.stage("quantise", layers + 1 + job.recipe.smooths if data else 1)
    oneshot(
        model=model,
        recipe=recipe,
        # A loader of whole batches; without it the pipeline is the one that needs no data.
        dataset=DataLoader(data, batch_size=None) if data else None,  # type: ignore[arg-type]
        num_calibration_samples=job.samples,
        moe_calibrate_all_experts=False,
    )
    if plain is not None:
        check_folded(model, sample(data), plain)
    return folds


def check_folded(model: nn.Module, ids: Tensor, plain: Tensor) -> None:
    """Hold a quantised model, its rounding switched off, against its own base: what is folded must have cancelled.

    Raises `ValueError`.
    """
    from compressed_tensors.quantization import disable_quantization, enable_quantization

    model.apply(disable_quantization)
    folded = logits(model, ids)
    model.apply(enable_quantization)
    apart = ((folded - plain).abs().max() / plain.abs().max()).item()
    limit = FOLDED_APART if next(model.parameters()).dtype == torch.float32 else NARROW_APART
    if not apart <= limit:
        raise ValueError(f"The folded model is not its base any more: its logits are {apart:.1%} apart.")


def narrow(job: Job, model: Any) -> None:
    """Bring all but the weights to the checkpoint's own dtype, and 2-bit weights into their 4-bit container."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    recipe, dtype = job.recipe, getattr(torch, job.dtype)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
            continue
        if module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)
        if not recipe.grouped:
            continue  # vLLM keeps the scales of int8 weights in float32
        module.weight_scale.data = module.weight_scale.data.to(dtype)
        if recipe.stored_bits == recipe.bits:
            continue
        if recipe.activation_bits is None:
            # Rounded to the values 2 bits can take; with the same scale and zero point 4 bits hold them exactly.
            module.weight.data = fake_quantize(
                module.weight.data,
                module.weight_scale.data,
                getattr(module, "weight_zero_point", None),
                scheme.weights,
            )
            weights = scheme.weights.model_copy(update={"num_bits": recipe.stored_bits})
            module.quantization_scheme = scheme.model_copy(update={"weights": weights})
    model.config.dtype = dtype


def save(job: Job, model: Any, folding: dict[str, Tensor]) -> None:
    """Write the checkpoint with all that an engine needs beside it."""
    from safetensors.torch import save_file

    out = Path(job.out)
    model.save_pretrained(out, save_compressed=True)
    for file in Path(job.model).iterdir():
        named = file.name not in WRITTEN and not file.name.endswith(".index.json")
        if file.is_file() and file.suffix in TEXT_FILES and named:
            shutil.copyfile(file, out / file.name)
    if folding:
        (out / FOLDING_FILE).parent.mkdir(exist_ok=True)
        save_file(folding, out / FOLDING_FILE)


def main(file: str) -> None:
    """Do the job in a file. Its result is in the folder the job names, and the last line of progress says `done`.

    What is refused is told as an `error`: the parts of the `XloomError`.
    """
    progress = Progress(own_stdout())
    end_with_parent()
    try:
        work(read_job(Path(file)), progress)
    except XloomError as error:
        progress.refuse(error)


def work(job: Job, progress: Progress) -> None:
    """From the plain model to the files of the quantised one. Raises `XloomError`."""
    torch.manual_seed(0)
    start = time.perf_counter()
    check_layers(job)
    data: list[dict[str, Tensor]] = []
    if job.recipe.calibrates:
        progress.stage("calibration text")
        data = batches(job)
    progress.stage("load")
    model = load(job)
    progress.stage("compare")
    plain = reference(job, model)
    folds = quantise(job, model, data, progress)
    progress.stage("compare")
    apart = plain.check(fidelity.token_logprobs(model, plain.ids), f"{job.model} at {job.recipe.bits} bits")
    progress.stage("save")
    narrow(job, model)
    save(job, model, folds.tensors())  # by the norms as they are now, rounded
    fidelity.write_reference(Path(job.out), plain)
    result = {
        "seconds": round(time.perf_counter() - start, 3),
        "windows": sum(len(each["input_ids"]) for each in data),
        "apart": apart,
        "limit": plain.limit,
    }
    (Path(job.out) / "worker.json").write_text(json.dumps(result), encoding="utf-8")
    progress.stage("done")


if __name__ == "__main__":
    main(sys.argv[1])
