"""Adapters and X-LoRA on quantised bases in vLLM, against plain torch over the dequantised weights.

The reference keeps the linears of the quantised checkpoint, and around each undoes the folding, under the norms of the
plain checkpoint. So it takes the adapters as they were prepared; that its base is the same model as the folded one is
what shows the recorded folding to be right.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from xloom.mixtures.reference import Reference
from xloom.protocol import AdapterRef, XloomError
from xloom.quantization import overlay, quantise
from xloom.quantization.checkpoint import load_dequantised, round_tokens, rounds_activations
from xloom.quantization.fidelity import distance, read_reference, token_logprobs
from xloom.quantization.folding import read_folding
from xloom.quantization.model_cache import read_done
from xloom.quantization.quantise import plan, quantised, quantised_folder
from xloom.quantization.source import plain_model
from xloom.settings import SAMPLE, IsqSettings, ModelSettings
from xloom.vllm.engine.backend import VLLMBackend

from ..models import HIDDEN, VOCAB, load_model, peft_logits, tiny_adapter, tiny_bundle, tiny_model, tiny_tokenizer
from .harness import Engine

pytestmark = pytest.mark.skipif(
    not (Path(sys.prefix) / overlay.FOLDER / "llmcompressor").is_dir(), reason="llmcompressor: make install"
)
PROMPT = list(range(40, 75))
NEW_TOKENS = 12
CANDIDATES = 8
CASES = {"awq": 4, "smoothquant": 8, "rtn": 2}
# Root mean square over log-probabilities; logits are of up to 7. The kernel for 4-bit weights takes no float32; with
# 8-bit activations a value between two steps may fall on either.
DTYPE = {"awq": "float16", "smoothquant": "float32", "rtn": "float16"}
TOLERANCE = {"awq": 0.06, "smoothquant": 0.03, "rtn": 0.06}


def outlying_model(folder: Path) -> Path:
    """A random model whose norms differ much between channels, so that smoothing has much to do; v fits o."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                spread = 0.0 if name == "model.norm.weight" else 1.0
                parameter.copy_(torch.exp(spread * torch.randn(parameter.shape)))
    model.generation_config.eos_token_id = 257
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@dataclass
class Served:
    """A plain model, its quantised folder, and an engine on that."""

    method: str
    plain: Path
    folder: Path
    engine: Engine
    work: Path

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.method]


@dataclass(frozen=True)
class Setting:
    """A plain model, and the settings its quantised forms share."""

    model: Path
    work: Path

    def isq(self, method: str, bits: int) -> IsqSettings:
        text = self.work / "text.txt"
        return IsqSettings(
            method=method, bits=bits, calibration_samples=8, calibration=str(text), cache=str(self.work / "cache")
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    work = tmp_path_factory.mktemp("quantised")
    lines = [f"Paragraph {number}: the quick brown fox jumps over {number * 37 % 101} dogs." for number in range(200)]
    (work / "text.txt").write_text("\n\n".join(lines))
    return Setting(outlying_model(work / "model"), work)


@pytest.fixture(scope="module", params=list(CASES))
def served(request: pytest.FixtureRequest, setting: Setting) -> Iterator[Served]:
    method: str = request.param
    isq = setting.isq(method, CASES[method])
    load = VLLMBackend.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLLMBackend, "load", partial(load, isq=isq))
        engine = Engine(setting.model, dtype=DTYPE[method])
    folder = Path(quantised(ModelSettings(source=str(setting.model)), isq, "cpu").source)  # from the cache by now
    work = setting.work / method
    work.mkdir()
    yield Served(method, setting.model, folder, engine, work)
    engine.close()


def unfolded(served: Served) -> nn.Module:
    """The dequantised model, folding undone around each linear, under the plain checkpoint's norms."""
    model = load_dequantised(served.folder, activations=False)
    folding = read_folding(served.folder) or {}
    rounds = rounds_activations(served.folder)
    plain = load_file(served.plain / "model.safetensors")
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.weight.data = plain[f"{name}.weight"].float()
        elif isinstance(module, nn.Linear) and ".layers." in name:
            s_in, s_out = folding.get(f"{name}.input"), folding.get(f"{name}.output")
            module.forward = partial(_forward, module, s_in, s_out, rounds)
    return model


def _forward(module: nn.Linear, s_in: Tensor | None, s_out: Tensor | None, rounds: bool, x: Tensor) -> Tensor:
    folded = x if s_in is None else x / s_in
    y = linear(round_tokens(folded) if rounds else folded, module.weight)
    return y if s_out is None else y * s_out


def error(served: Served, ref: AdapterRef | None, logits: Any) -> float:
    """How far candidates' log-probabilities are from those of `logits(ids) [num_tokens, vocabulary]`, root mean square
    over new tokens."""
    answer = served.engine.generate(PROMPT, ref, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)
    oracle = logits(PROMPT + answer.tokens)[len(PROMPT) - 1 : -1].log_softmax(-1)
    differences = [
        logprob - oracle[position, token].item()
        for position, candidates in enumerate(answer.scores)
        for token, logprob in candidates.items()
    ]
    return float(torch.tensor(differences).square().mean().sqrt())


def without_rescaling(served: Served, name: str, prepared: Path) -> AdapterRef:
    """The prepared folder given to vLLM as it is."""
    backend, ref = served.engine.backend, AdapterRef(name, "test", "lora")
    folding, backend._folding = backend._folding, None
    try:
        served.engine.call(backend.add_adapter(ref, prepared))
    finally:
        backend._folding = folding
    return ref


def test_a_killed_worker_leaves_nothing_and_then_two_callers_quantise_once(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    isq = setting.isq("rtn", 2)
    settled = plan(plain_model(ModelSettings(source=str(setting.model))), isq, "cpu")
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        process = popen(*args, **kwargs)
        started.append(process)
        return process

    monkeypatch.setattr(quantise.subprocess, "Popen", start)

    def kill(stage: str, done: int, total: int) -> None:
        os.kill(started[-1].pid, signal.SIGKILL)

    with pytest.raises(XloomError) as caught:
        quantised_folder(settled, isq, "cpu", report=kill)
    assert caught.value.code == "isq_failed"
    assert "signal 9" in caught.value.message
    assert [entry.name for entry in (setting.work / "cache").iterdir() if entry.name.startswith(settled.key)] == [
        f"{settled.key}.lock"
    ]

    started.clear()
    with ThreadPoolExecutor(2) as pool:
        folders = {each.result() for each in [pool.submit(quantised_folder, settled, isq, "cpu") for _ in range(2)]}
    assert len(folders) == 1
    assert len(started) == 1


def test_a_gemma_is_folded_where_its_norms_feed_linears_and_stays_itself(setting: Setting) -> None:
    plain = tiny_model(setting.work / "gemma", "gemma3", tied=True)
    source = ModelSettings(source=str(plain))
    folder = Path(quantised(source, setting.isq("smoothquant", 8), "cpu").source)
    folding = read_folding(folder)
    assert folding is not None
    assert {key.split(".", 3)[3] for key in folding} == {
        f"{name}.input"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    base, rounded = load_model(plain), load_dequantised(folder)
    norms = [module.state_dict() for module in (base, rounded)]
    for layer in (0, 1):
        name = f"model.layers.{layer}.{{}}.weight".format
        untouched, folded = name("post_attention_layernorm"), name("pre_feedforward_layernorm")
        torch.testing.assert_close(norms[0][untouched], norms[1][untouched])
        assert not torch.allclose(norms[0][folded], norms[1][folded])
    wanted, found = (peft_logits(module, PROMPT).log_softmax(-1) for module in (base, rounded))
    assert (wanted - found).square().mean().sqrt() < 0.2  # of 8 bits; the wrong norms made it 1.2


def test_the_checkpoint_says_what_was_done_and_is_smaller(served: Served) -> None:
    done = read_done(served.folder)
    assert done["recipe"]["method"] == served.method
    before, after = done["linear_bytes"]
    assert after < before * (0.3 if done["recipe"]["stored_bits"] == 8 else 0.2)  # of float32
    folding = read_folding(served.folder) or {}
    parts = {key.rsplit(".", 2)[-2] for key in folding if key.endswith(".input")}
    assert (
        parts
        == {
            "awq": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            "smoothquant": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
            "rtn": set(),
        }[served.method]
    )
    outputs = {key.rsplit(".", 2)[-2] for key in folding if key.endswith(".output")}
    assert outputs == ({"v_proj", "up_proj"} if served.method == "awq" else set())
    assert any(scale.max() / scale.min() > 1.5 for scale in folding.values()) == bool(folding)


def test_the_served_model_was_held_against_its_own_base(served: Served) -> None:
    # By the worker as it was made, and by the engine before it took a request; here once more.
    reference = read_reference(served.folder)
    assert reference is not None
    apart, limit = read_done(served.folder)["apart"]
    assert 0 < apart <= limit
    plain = load_model(served.plain)
    assert distance(token_logprobs(plain, reference.ids), reference.logprobs) < 1e-4
    found = token_logprobs(load_dequantised(served.folder), reference.ids)
    assert abs(reference.check(found, "it") - apart) < 0.05


def test_a_quantised_model_that_is_not_its_base_is_not_served(setting: Setting, tmp_path: Path) -> None:
    whole = quantised(ModelSettings(source=str(SAMPLE / "base")), setting.isq("rtn", 4), "cpu").source
    apart, limit = read_done(Path(whole))["apart"]
    assert apart < limit < 0.3  # a trained model's: a random one is never far from broken
    broken = Path(shutil.copytree(whole, tmp_path / "broken"))
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 1.5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(XloomError) as caught:
        Engine(broken, dtype="bfloat16", xlora=False)
    assert caught.value.code == "isq_not_its_base"


def test_two_bit_weights_take_four_values_in_a_group(served: Served) -> None:
    if served.method != "rtn":
        pytest.skip("of the 2-bit case")
    weight = load_dequantised(served.folder).state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert all(len(row[:128].unique()) <= 4 for row in weight)


def test_the_base_equals_the_dequantised_weights(served: Served) -> None:
    assert error(served, None, partial(peft_logits, load_dequantised(served.folder))) < served.tolerance
    assert error(served, None, partial(peft_logits, unfolded(served))) < served.tolerance


def test_an_adapter_equals_the_reference_and_without_rescaling_does_not(served: Served) -> None:
    adapter = tiny_adapter(served.work / "adapter", served.plain, seed=9)
    prepared = served.work / "adapter-prepared"
    ref = served.engine.adapter("plain", adapter, prepared)
    model = PeftModel.from_pretrained(unfolded(served), adapter)
    model.eval()
    assert error(served, ref, partial(peft_logits, model)) < served.tolerance
    assert error(served, None, partial(peft_logits, model)) > 0.5  # the adapter matters
    if read_folding(served.folder) is not None:
        wrong = without_rescaling(served, "unscaled", prepared)
        assert error(served, wrong, partial(peft_logits, model)) > 5 * served.tolerance


def test_xlora_equals_the_reference_and_without_rescaling_does_not(served: Served) -> None:
    bundle = tiny_bundle(served.work / "bundle", served.plain, seed=3)
    prepared = served.work / "bundle-prepared"
    ref = served.engine.bundle("blend", bundle, prepared)
    reference = Reference.load(unfolded(served), prepared)
    assert error(served, ref, reference.logits) < served.tolerance
    assert error(served, None, reference.logits) > 0.5
    if read_folding(served.folder) is not None:
        wrong = without_rescaling(served, "unscaled-blend", prepared)
        assert error(served, wrong, reference.logits) > 5 * served.tolerance


def test_removing_an_adapter_removes_its_rescaled_files(served: Served) -> None:
    if read_folding(served.folder) is None:
        pytest.skip("nothing is rescaled")
    backend = served.engine.backend
    adapter = tiny_adapter(served.work / "short", served.plain, seed=4)
    ref = served.engine.adapter("short", adapter, served.work / "short-prepared")
    assert backend._rescaled is not None
    count = len(list(backend._rescaled.iterdir()))
    served.engine.call(backend.remove_adapter(ref))
    assert len(list(backend._rescaled.iterdir())) == count - 1
