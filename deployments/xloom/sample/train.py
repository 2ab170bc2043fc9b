"""Train the sample: tokenizer, base model, one LoRA adapter per domain, X-LoRA classifier.

Stages run in order, and a stage whose result exists is skipped, so that an interrupted run goes on.
Written for one or two CPU cores: about an hour and a half in all. `python -m xloom.sample.train --help`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from xloom.sample.corpus import ASSISTANT, BEGIN, DOMAINS, END, SPECIAL_TOKENS, SYSTEM, USER, Document, documents

ADAPTER_RANKS = {"code": 16, "docs": 8, "json": 4, "maths": 8}
BASE_MIX = {"code": 0.42, "docs": 0.30, "json": 0.14, "maths": 0.14}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 4096
MAX_POSITIONS = 2048

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}" + SYSTEM + "{% elif message['role'] == 'assistant' %}" + ASSISTANT + ""
    "{% else %}" + USER + "{% endif %}{{ message['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def train_tokenizer(corpus: list[Document], out: Path) -> None:
    """Train a byte-level BPE of `VOCABULARY` entries (digits apart) and save it with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in corpus if not document.held_out)
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    ).save_pretrained(out)


def base_config() -> LlamaConfig:
    """The base model: 4.5 M parameters, sizes that are multiples of 128, grouped-query attention."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BEGIN),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(END),
    )


def token_streams(
    corpus: list[Document], tokenizer: PreTrainedTokenizerFast, held_out: bool
) -> dict[str, torch.Tensor]:
    """Each domain's documents, shuffled and joined into one token tensor `[num_tokens]`."""
    streams = {}
    for domain in DOMAINS:
        texts = [d.text for d in corpus if d.domain == domain and d.held_out == held_out]
        random.Random(0).shuffle(texts)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        streams[domain] = torch.tensor([token for text in ids for token in text])
    return streams


def batches(
    streams: dict[str, torch.Tensor], mix: dict[str, float], tokens: int, length: int, seed: int
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Endless batches `[tokens / length, length]` of random windows, domains drawn by `mix`, with each row's domain."""
    rng = random.Random(seed)
    while True:
        domains = rng.choices(list(mix), weights=list(mix.values()), k=tokens // length)
        starts = [rng.randrange(len(streams[domain]) - length) for domain in domains]
        rows = [streams[domain][start : start + length] for domain, start in zip(domains, starts, strict=True)]
        yield torch.stack(rows), domains


def mixed_batches(
    streams: dict[str, torch.Tensor], tokens: int, piece: int, pieces: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches `[tokens / (piece * pieces), piece * pieces]` of rows joined from pieces of random domains, and
    each token's domain, of the same shape."""
    flat = batches(streams, dict.fromkeys(DOMAINS, 1.0), tokens, piece, seed)
    while True:
        parts, domains = next(flat)
        numbers = torch.tensor([DOMAINS.index(domain) for domain in domains]).repeat_interleave(piece)
        yield parts.reshape(-1, piece * pieces), numbers.reshape(-1, piece * pieces)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 4% of the steps, then a cosine down to a twentieth of the peak."""
    warm = max(1, steps // 25)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


class Trainer:
    """AdamW over the trainable parameters of `model`, one call of `step` a batch."""

    def __init__(self, model: nn.Module, steps: int, peak: float, name: str) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.95), weight_decay=0.05)
        self.steps, self.peak, self.done = steps, peak, 0
        self.bar = tqdm(total=steps, desc=name, mininterval=20, ascii=True)

    def step(self, loss: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.steps, self.peak)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.done += 1
        self.bar.update(1)
        if self.done % 20 == 0:
            self.bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@dataclass(frozen=True)
class Phase:
    """A stretch of the base's training, with an optimiser of its own."""

    steps: int
    schedule: int  # steps the learning rate is planned over; the phase may end before
    peak: float
    long_share: float  # last share of the steps that runs on rows of `MAX_POSITIONS` tokens


# 1,000 steps at a high rate, then down to nothing on short and long rows: 5.3 million tokens in all.
BASE_PHASES = (Phase(1000, 1800, 3e-3, 0.0), Phase(300, 300, 1.5e-3, 0.3))


def train_base(streams: dict[str, torch.Tensor], out: Path, checkpoints: Path) -> None:
    """Train the base on all domains; a phase whose checkpoint exists is skipped."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(base_config())
    for number, phase in enumerate(BASE_PHASES):
        checkpoint = checkpoints / f"phase-{number}"
        if checkpoint.exists():
            model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            continue
        model.train()
        trainer = Trainer(model, phase.schedule, phase.peak, f"base, phase {number + 1}")
        short = batches(streams, BASE_MIX, tokens=4096, length=512, seed=2 * number + 1)
        long = batches(streams, BASE_MIX, tokens=4096, length=MAX_POSITIONS, seed=2 * number + 2)
        for step in range(phase.steps):
            rows, _ = next(short if step < phase.steps * (1 - phase.long_share) else long)
            trainer.step(model(rows, labels=rows).loss)
        model.save_pretrained(checkpoint)
    model.to(torch.bfloat16).save_pretrained(out)


def load_base(out: Path) -> PreTrainedModel:
    """The trained base in float32."""
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    return model


def train_adapter(streams: dict[str, torch.Tensor], base: Path, out: Path, domain: str, steps: int) -> None:
    """Train one LoRA adapter on its domain; bfloat16 on disk."""
    torch.manual_seed(10 + DOMAINS.index(domain))
    rank = ADAPTER_RANKS[domain]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.0)
    model = get_peft_model(load_base(base), lora)
    trainer = Trainer(model, steps, 2e-3, f"adapter {domain}")
    rows_of = batches(streams, {domain: 1.0}, tokens=4096, length=512, seed=20)
    for _ in range(steps):
        rows, _ = next(rows_of)
        trainer.step(model(rows, labels=rows).loss)
    model.to(torch.bfloat16).save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    config_file = out / "adapter_config.json"
    config = json.loads(config_file.read_text()) | {"base_model_name_or_path": "base"}
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def xlora_config(adapters: Path, hidden_size: int) -> XLoraConfig:
    """A depth-1 classifier with one softmax per layer over the domains' adapters."""
    return XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=hidden_size,
        adapters={str(number): str(adapters / domain) for number, domain in enumerate(DOMAINS)},
        xlora_depth=1,
        layerwise_scalings=True,
        enable_softmax=True,
        softmax_temperature=1.0,
    )


def classifier_of(model: PeftModel) -> nn.Module:
    classifier: nn.Module = model.base_model.internal_xlora_classifier
    return classifier


def train_xlora(streams: dict[str, torch.Tensor], base: Path, adapters: Path, out: Path, steps: int) -> None:
    """Train the X-LoRA classifier on mixed text; the loss is the language model's, plus a small push of each token's
    mean gate towards its domain (weight 0.05) so that routing stays readable."""
    torch.manual_seed(30)
    base_model = load_base(base)
    base_model.config.use_cache = False
    config = xlora_config(adapters, base_model.config.hidden_size)
    model = get_peft_model(base_model, config)
    classifier = classifier_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "internal_xlora_classifier" in name
    gates: list[torch.Tensor] = []
    classifier.register_forward_hook(lambda module, args, result: gates.append(result))
    trainer = Trainer(model, steps, 5e-3, "x-lora")
    rows_of = mixed_batches(streams, tokens=2048, piece=128, pieces=2, seed=40)
    for _ in range(steps):
        rows, domains = next(rows_of)
        gates.clear()
        loss = model(input_ids=rows, labels=rows).loss
        mean_gate = gates[-1].mean(dim=2)  # [rows, tokens, adapters]
        push = nn.functional.nll_loss(torch.log(mean_gate + 1e-9).flatten(0, 1), domains.flatten())
        trainer.step(loss + 0.05 * push)
    save_bundle(classifier, config, out)


def save_bundle(classifier: nn.Module, config: XLoraConfig, out: Path) -> None:
    """Write a PEFT X-LoRA directory whose adapters are the sample's own, by relative path.

    PEFT 0.21's `save_pretrained` drops classifier tensors whose index equals an adapter's name, so the file is
    written here.
    """
    out.mkdir(parents=True, exist_ok=True)
    prefix = "base_model.internal_xlora_classifier."
    weights = {prefix + name: tensor.detach().contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {
        "base_model_name_or_path": "base",
        "adapters": {str(number): f"../adapters/{domain}" for number, domain in enumerate(DOMAINS)},
    }
    text = json.dumps(written, indent=2, sort_keys=True, default=str) + "\n"
    (out / "adapter_config.json").write_text(text)
    if not load_file(out / "adapter_model.safetensors"):
        raise RuntimeError("the X-LoRA classifier file came out empty")


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m xloom.sample.train --out /tmp/sample --threads 2",
    )
    parser.add_argument(
        "--out", type=Path, default=here, help="folder for base/, adapters/ and blend/ (default: %(default)s)"
    )
    parser.add_argument("--adapter-steps", type=int, default=140, help="steps for each adapter (%(default)s)")
    parser.add_argument("--xlora-steps", type=int, default=90, help="classifier steps of 2,048 tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    base = out / "base"
    corpus = documents()
    if not (base / "tokenizer.json").exists():
        train_tokenizer(corpus, base)
    streams = token_streams(corpus, PreTrainedTokenizerFast.from_pretrained(base), held_out=False)
    print({domain: len(stream) for domain, stream in streams.items()}, "training tokens", flush=True)
    if not (base / "model.safetensors").exists():
        train_base(streams, base, out / "checkpoints")
    for domain in DOMAINS:
        if not (out / "adapters" / domain / "adapter_model.safetensors").exists():
            train_adapter(streams, base, out / "adapters" / domain, domain, arguments.adapter_steps)
    if not (out / "blend" / "adapter_model.safetensors").exists():
        train_xlora(streams, base, out / "adapters", out / "blend", arguments.xlora_steps)


if __name__ == "__main__":
    main()
