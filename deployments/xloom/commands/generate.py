"""`xloom generate`: the continuation of a text, by a model in this process or behind a URL."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from xloom.commands.text_model import Answer, Options, TextModel
from xloom.protocol import XloomError

STDIN = "-"


def words_of(words: Sequence[str], prompt: str | None) -> tuple[Path | None, str]:
    """The settings file and the prompt, from `[SETTINGS] PROMPT` or `[SETTINGS] --prompt`. Raises `XloomError`."""
    given = list(words)
    if prompt is None:
        if not given and sys.stdin.isatty():
            raise XloomError("no_prompt", "There is no prompt.", 'xloom generate "Once upon a time"')
        prompt = given.pop() if given else STDIN
    if len(given) > 1:
        raise XloomError("no_prompt", f"{len(words)} words are too many.", "Quote the prompt.")
    text = sys.stdin.read() if prompt == STDIN else prompt
    return (Path(given[0]) if given else None), text


def generate(source: TextModel, prompt: str, model: str | None, options: Options, *, as_json: bool) -> int:
    """Print the continuation as it comes. Raises `XloomError`."""
    show(source.complete(prompt, source.named(model), options), as_json=as_json)
    return 0


def show(answer: Answer, *, as_json: bool) -> str:
    """Print an answer, piece by piece, or as one line of JSON; its text."""
    text = ""
    with closing(answer.pieces) as pieces:  # an answer cut short must not go on where it is made
        for piece in pieces:
            text += piece
            if not as_json:
                print(piece, end="", flush=True)
    if as_json:
        fields = {"model": answer.model, "text": text, "finish_reason": answer.finish_reason}
        print(json.dumps(fields | {"num_tokens": answer.num_tokens}, ensure_ascii=False), flush=True)
    else:
        print(flush=True)
    return text
