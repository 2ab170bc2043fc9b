"""Held-out perplexity of the sample's base, adapters and X-LoRA on each domain, and the mean gates: docs/sample.md."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from xloom.sample.corpus import DOMAINS, documents
from xloom.sample.train import classifier_of, load_base, token_streams, xlora_config

LENGTH = 512  # tokens in a window
PIECE = 128  # tokens of one domain in a mixed window
PREFIX = "base_model.internal_xlora_classifier."


def windows(streams: dict[str, Tensor], count: int, seed: int) -> dict[str, Tensor]:
    """`[count, LENGTH]` held-out windows of each domain, and of `mixed`, which joins pieces of all."""
    rng = random.Random(seed)

    def cut(domain: str, length: int) -> Tensor:
        start = rng.randrange(len(streams[domain]) - length)
        return streams[domain][start : start + length]

    made = {domain: torch.stack([cut(domain, LENGTH) for _ in range(count)]) for domain in DOMAINS}
    mixed = []
    for _ in range(count):
        order = rng.sample(DOMAINS, LENGTH // PIECE)
        mixed.append(torch.cat([cut(domain, PIECE) for domain in order]))
    return made | {"mixed": torch.stack(mixed)}


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    """exp of the mean negative log-likelihood of a token."""
    losses = []
    for row in rows:
        logits = model(input_ids=row[None]).logits[0]
        losses.append(cross_entropy(logits[:-1].float(), row[1:]).item())
    return math.exp(sum(losses) / len(losses))


def load_xlora(folder: Path) -> tuple[PeftModel, list[Tensor]]:
    """PEFT's X-LoRA with the sample's classifier, and the list its gates `[1, tokens, layers, adapters]` are put in."""
    base = load_base(folder / "base")
    base.config.use_cache = False
    model = get_peft_model(base, xlora_config(folder / "adapters", base.config.hidden_size))
    classifier = classifier_of(model)
    weights = load_file(folder / "blend" / "adapter_model.safetensors")
    classifier.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in weights.items()})
    gates: list[Tensor] = []
    classifier.register_forward_hook(lambda module, args, result: gates.append(result.detach()))
    model.eval()
    return model, gates


def evaluate(folder: Path, count: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """`perplexity`: model -> domain -> value; `gates`: domain -> adapter -> mean gate."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    rows = windows(token_streams(documents(), tokenizer, held_out=True), count, seed)
    table: dict[str, dict[str, float]] = {}
    models: dict[str, nn.Module] = {"base": load_base(folder / "base")}
    for domain in DOMAINS:
        models[domain] = PeftModel.from_pretrained(load_base(folder / "base"), folder / "adapters" / domain)
    for name, model in models.items():
        model.eval()
        table[name] = {d: perplexity(model, texts) for d, texts in tqdm(rows.items(), name)}
    xlora, gates = load_xlora(folder)
    table["X-LoRA"], mean_gates = {}, {}
    for domain, texts in tqdm(rows.items(), "X-LoRA"):
        gates.clear()
        table["X-LoRA"][domain] = perplexity(xlora, texts)
        mean = torch.cat([gate.mean(dim=(1, 2)) for gate in gates]).mean(dim=0)
        mean_gates[domain] = dict(zip(DOMAINS, mean.tolist(), strict=True))
    return {"perplexity": table, "gates": mean_gates}


def as_markdown(result: dict[str, dict[str, dict[str, float]]]) -> str:
    """Two tables for the docs."""
    columns = [*DOMAINS, "mixed"]
    lines = ["| perplexity on | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for model, values in result["perplexity"].items():
        name = model if model in ("base", "X-LoRA") else f"adapter `{model}`"
        lines.append(f"| {name} | " + " | ".join(f"{values[column]:.2f}" for column in columns) + " |")
    lines += [
        "",
        "| mean gate on | " + " | ".join(f"`{name}`" for name in DOMAINS) + " |",
        "|---|" + "---|" * len(DOMAINS),
    ]
    for domain, gates in result["gates"].items():
        lines.append(f"| {domain} | " + " | ".join(f"{gates[name]:.2f}" for name in DOMAINS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python -m xloom.sample.evaluate --json")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent, help="the sample (default: the shipped one)"
    )
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens a domain (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="which windows (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    result = evaluate(arguments.folder, arguments.windows, arguments.seed)
    print(json.dumps(result) if arguments.json else as_markdown(result))


if __name__ == "__main__":
    main()
