"""Train the sample: tokenizer, base model, one LoRA adapter per domain, X-LoRA classifier.

Stages run in order, and a stage whose result exists is skipped, so that an interrupted run goes on.
Written for one or two CPU cores: about an hour and a half in all. `python -m xloom.sample.train --help`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from xloom.compose import training
from xloom.compose.bundle_writer import write_xlora
from xloom.compose.learned import ClassifierRouter
from xloom.compose.losses import language_loss
from xloom.compose.mixture import Mixture
from xloom.compose.optimiser import Optimiser
from xloom.compose.text import Batches, Streams
from xloom.mixtures.lora import read_lora
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.stacking import stack_adapters
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


class Trainer(Optimiser):
    """An optimiser over the trainable parameters of `model`, with a bar."""

    def __init__(self, model: nn.Module, steps: int, peak: float, name: str) -> None:
        super().__init__([parameter for parameter in model.parameters() if parameter.requires_grad], steps, peak)
        self.bar = tqdm(total=steps, desc=name, mininterval=20, ascii=True)

    def step(self, loss: torch.Tensor) -> None:
        super().step(loss)
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
    """Train the X-LoRA classifier as `xloom compose` does, on rows joined from all domains.

    The loss is the language model's, plus a small push of each token's mean gate towards its domain (weight 0.05) so
    that routing stays readable. The bundle's adapters are the sample's own, by relative path.
    """
    torch.manual_seed(30)
    modules = linear_modules(str(base))
    stack = stack_adapters({domain: read_lora(adapters / domain, modules) for domain in DOMAINS}, modules)
    mixture = Mixture(load_base(base), stack)
    config = xlora_config(adapters, mixture.config.hidden_size)
    router = ClassifierRouter(
        stack,
        config.hidden_size,
        depth=config.xlora_depth,
        size=config.xlora_size,
        layerwise=config.layerwise_scalings,
        temperature=config.softmax_temperature,
    )
    batches = Batches(Streams(streams, None), rows=8, length=256, piece=128, seed=40)
    router.look(mixture, batches.draw(-1)[0])

    def loss(step: int) -> torch.Tensor:
        return language_loss(mixture, router, *batches.draw(step), share=0.05)

    with tqdm(total=steps, desc="x-lora", mininterval=20, ascii=True) as bar:
        training.train(
            router, training.Training("x-lora", steps, 5e-3, loss), told=lambda told: bar.update(told.step - bar.n)
        )
    write_xlora(out, router, [f"../adapters/{domain}" for domain in DOMAINS], "base")


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
