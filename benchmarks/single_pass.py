"""What routing in one pass costs in quality: held-out perplexity of the sample's mixture, agreement with two passes.

Windows of held-out text are read as a prompt and an answer, teacher-forced; the answer's tokens are measured. Mixed
windows join pieces of 128 tokens of all domains, so that gates of the token before are wrong at each seam.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from xloom.mixtures.hooks import Span, adapted
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.reference import Reference
from xloom.mixtures.single_pass import segment_end
from xloom.protocol import Overrides
from xloom.sample.corpus import documents
from xloom.sample.evaluate import LENGTH, windows
from xloom.sample.train import load_base, token_streams
from xloom.settings import SAMPLE

PROMPTS = (64, 448)  # tokens of a window that are prompt
WAYS = {
    "two passes": Overrides(),
    "one pass": Overrides(routing_passes=1),
    "one pass, lagged prefill": Overrides(routing_passes=1, prefill="lagged"),
}


@torch.no_grad()
def answer_logits(found: Reference, row: Tensor, prompt: int) -> Tensor:
    """The logits `[tokens of the answer, vocab]` that precede each token of a window's answer."""
    routing = found.routing
    if routing.routing_passes == 2:
        return found.logits(row.tolist())[prompt - 1 : -1]
    modules, cache, pieces, position = dict(found.model.named_modules()), None, [], 0
    gates = routing.scaling_pass_gates()[None]
    if routing.prefill == "exact":
        gates, position = found.gates(row[:prompt].tolist()), 0
    while position < len(row):
        end = segment_end(position, prompt, routing.prefill)
        if position == 0 and routing.prefill == "exact":
            end = prompt
        with adapted(modules, [Span(slice(None), found.bundle, gates.expand(end - position, -1, -1))]):
            out = found.model(
                input_ids=row[None, position:end], past_key_values=cache, use_cache=True, output_hidden_states=True
            )
        cache, position = out.past_key_values, end
        gates = routing.gates(out.hidden_states[-1][0, -1:])
        pieces.append(out.logits[0])
    return torch.cat(pieces)[prompt - 1 : -1]


def measure(count: int, seed: int) -> dict[str, Any]:
    """Prompt length -> way -> domain -> `perplexity` and `agreement` (share of tokens with the same best one)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SAMPLE / "base")
    rows = windows(token_streams(documents(), tokenizer, held_out=True), count, seed)
    base = load_base(SAMPLE / "base").float().eval()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        references = {}
        for way, overrides in WAYS.items():
            prepared = Path(folder) / way.replace(" ", "-")
            prepare_bundle(
                SAMPLE / "blend", linear_modules(str(SAMPLE / "base")), prepared, hidden_size=base.config.hidden_size,
                max_rank=256, overrides=overrides,
            )  # fmt: skip
            references[way] = Reference.load(base, prepared)
        for prompt in PROMPTS:
            table: dict[str, Any] = {way: {} for way in WAYS}
            for domain, texts in rows.items():
                best: dict[str, list[Tensor]] = {way: [] for way in WAYS}
                losses: dict[str, list[float]] = {way: [] for way in WAYS}
                for row in tqdm(texts, f"{domain}, prompt {prompt}"):
                    for way, found in references.items():
                        logits = answer_logits(found, row, prompt)
                        losses[way].append(cross_entropy(logits.float(), row[prompt:]).item())
                        best[way].append(logits.argmax(-1))
                exact = torch.cat(best["two passes"])
                for way in WAYS:
                    table[way][domain] = {
                        "perplexity": math.exp(sum(losses[way]) / len(losses[way])),
                        "agreement": (torch.cat(best[way]) == exact).float().mean().item(),
                    }
            result[str(prompt)] = table
    return result


def as_markdown(result: dict[str, Any]) -> str:
    """A table for the docs."""
    lines = []
    for prompt, table in result.items():
        columns = list(table["two passes"])
        lines += [f"| {prompt} of {LENGTH} tokens are prompt | " + " | ".join(columns) + " |"]
        lines += ["|---|" + "---|" * len(columns)]
        for way, values in table.items():
            cells = [f"{each['perplexity']:.2f} ({each['agreement']:.1%})" for each in values.values()]
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python -m benchmarks.single_pass --json")
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of 512 tokens a domain (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="which windows (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    result = measure(arguments.windows, arguments.seed)
    print(json.dumps(result) if arguments.json else as_markdown(result))


if __name__ == "__main__":
    main()
