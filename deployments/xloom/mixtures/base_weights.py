"""Single tensors of the base model's checkpoint, for what rides along in adapters to be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from xloom.mixtures.files import read_json
from xloom.protocol import XloomError

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}  # a checkpoint without the first has both in one


@dataclass(frozen=True)
class BaseWeights:
    """The checkpoint of a base model: a local folder, or a hub model that the local cache holds."""

    source: str
    revision: str | None = None

    def read(self, name: str) -> torch.Tensor | None:
        """One parameter by its Hugging Face name; None where this machine can't read it from safetensors."""
        folder = self._folder()
        if folder is None:
            return None
        for wanted in (name, _TIED.get(name, name)):
            try:
                with safe_open(folder / self._file(folder, wanted), framework="pt") as file:
                    tensor: torch.Tensor = file.get_tensor(wanted)
                    return tensor
            except (OSError, SafetensorError, XloomError):
                continue
        return None

    def _folder(self) -> Path | None:
        folder = Path(self.source).expanduser()
        if folder.is_dir():
            return folder
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(self.source, revision=self.revision, local_files_only=True))
        except Exception:  # not installed, no such model, not in the cache: each has its own kind
            return None

    @staticmethod
    def _file(folder: Path, name: str) -> str:
        if (folder / "model.safetensors").is_file():
            return "model.safetensors"
        shards = read_json(folder / "model.safetensors.index.json", "unreadable_model").get("weight_map")
        return Path(str(shards.get(name, "-"))).name if isinstance(shards, dict) else "-"
