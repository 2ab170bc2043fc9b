"""The folder mistral.rs loads: the model's own weights behind a configuration and a tokenizer it can use.

mistral.rs takes text and gives text, never token ids. So it is given a tokenizer in which token `i` is the one
character `chr(0x10000 + i)`: text and tokens are then the same thing, both ways, and what it samples is known exactly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xloom.protocol import XloomError

CACHE = Path("~/.cache/xloom/mistralrs")
FORMAT = 2  # of what is written here; part of the folder's name
FIRST = 0x10000  # beyond it every code point is a character of four bytes in UTF-8, and none is normalised
MOST_TOKENS = 0x110000 - FIRST
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"  # a stream takes messages only


def text_of(tokens: Sequence[int]) -> str:
    """The text that mistral.rs reads as these tokens."""
    return "".join(chr(FIRST + token) for token in tokens)


def tokens_of(text: str) -> list[int]:
    """The tokens of a text mistral.rs wrote. Raises `ValueError` when it isn't in the tokenizer's alphabet."""
    tokens = [ord(character) - FIRST for character in text]
    if tokens and min(tokens) < 0:
        raise ValueError(f"{text!r} is not written in the tokenizer's alphabet")
    return tokens


def tokenizer_json(vocabulary: int) -> dict[str, Any]:
    """A tokenizer in the `tokenizers` format with one character a token.

    BPE without merges; a decoder with ByteFallback, because mistral.rs (through toktrie) knows a token's bytes only
    for ByteLevel and ByteFallback decoders.
    """
    if vocabulary > MOST_TOKENS:
        message = f"The model has {vocabulary} tokens; the mistralrs backend takes up to {MOST_TOKENS}."
        raise XloomError("unsupported_architecture", message, "Use another backend.")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {chr(FIRST + token): token for token in range(vocabulary)},
            "merges": [],
        },
    }


def patched_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as mistral.rs 0.9 reads it.

    transformers 5 writes `rope_parameters`; mistral.rs looks for `rope_theta`, `rope_scaling`, `rope_local_base_freq`.
    Its Llama takes heads to be hidden / heads wide; its Mistral, the same model else, heeds `head_dim`. It would end
    a request at `eos_token_id` without a word of which token it was, even where the request says to go on.
    """
    patched = {key: value for key, value in config.items() if key != "eos_token_id"}
    rope = config.get("rope_parameters")
    if config.get("architectures") == ["LlamaForCausalLM"] and config.get("head_dim"):
        scaled = config.get("rope_scaling") or (rope or {}).get("rope_type", "default") != "default"
        if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"] and not scaled:
            patched |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    if not isinstance(rope, dict):
        return patched
    full = rope.get("full_attention", rope)  # one entry for each kind of layer, or one for all
    if "rope_theta" in full:
        patched.setdefault("rope_theta", full["rope_theta"])
    sliding = rope.get("sliding_attention")
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        patched.setdefault("rope_local_base_freq", sliding["rope_theta"])
    if full.get("rope_type", "default") != "default":
        patched.setdefault("rope_scaling", {key: value for key, value in full.items() if key != "rope_theta"})
    return patched


def model_folder(source: str, revision: str | None) -> Path:
    """The model's own folder, fetched from the hub when `source` is not one. Raises `XloomError`."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:
            raise _not_loadable(source, str(error)) from error
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise _not_loadable(source, "config.json or safetensors are missing")
    return folder.resolve()


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`. Raises `XloomError` (model_not_loadable)."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_loadable(str(folder), str(error)) from error
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise _not_loadable(str(folder), "its configuration names no vocab_size: not a text model")
    return config


def eos_tokens(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """The tokens that end a text by the model's own word: its generation configuration's, else its configuration's."""
    found = config.get("eos_token_id")
    with contextlib.suppress(OSError, ValueError):  # it is optional
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id", found)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


def served_folder(model: Path, cache: Path | None = None) -> Path:
    """The folder to load for `model`, made once and kept: links to the weights beside our own JSON files.

    Without an end-of-text token or sampling defaults in it: the backend decides when a request ends.
    """
    config = read_config(model)
    weights = sorted([*model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")])
    named = [[file.name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in weights]
    digest = hashlib.sha256(json.dumps([FORMAT, config, named], sort_keys=True).encode()).hexdigest()
    folder = (cache or CACHE).expanduser() / digest[:32]
    if folder.is_dir():
        return folder
    making = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    making.mkdir(parents=True)
    try:
        for file in weights:
            (making / file.name).symlink_to(file.resolve())
        tokenizer = tokenizer_json(config["vocab_size"])
        for name, content in (
            ("config.json", patched_config(config)),
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", {"chat_template": CHAT_TEMPLATE}),
        ):
            (making / name).write_text(json.dumps(content), encoding="utf-8")
        os.rename(making, folder)
    except FileExistsError:  # another process was quicker
        shutil.rmtree(making)
    except OSError:
        shutil.rmtree(making, ignore_errors=True)
        if not folder.is_dir():  # renaming onto a folder that is not empty has more than one errno
            raise
    return folder


def _not_loadable(source: str, why: str) -> XloomError:
    return XloomError(
        "model_not_loadable",
        f"No model could be read from {source!r}: {why}",
        "Name a local folder with config.json and safetensors, or a hub id.",
    )
