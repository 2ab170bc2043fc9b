"""The sample's X-LoRA bundle is trained and written by the code of `xloom compose`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from xloom.sample.corpus import DOMAINS
from xloom.sample.train import train_xlora
from xloom.settings import SAMPLE


def test_what_trains_the_sample_writes_a_bundle_of_the_shipped_ones_form(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    streams = {domain: torch.randint(0, 4096, (300,), generator=generator) for domain in DOMAINS}
    train_xlora(streams, SAMPLE / "base", SAMPLE / "adapters", tmp_path, steps=1)
    written, shipped = load_file(tmp_path / "adapter_model.safetensors"), SAMPLE / "blend"
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in load_file(shipped / "adapter_model.safetensors").items()
    }
    assert any(tensor.any() for tensor in written.values())
    config, known = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, shipped))
    assert {name for name in known if config.get(name) != known[name]} <= {"peft_version", "xlora_dropout_p"}
