"""What a request's JSON may ask for: a pure check of its bytes against the limits, before anybody acts on them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from xloom.protocol import XloomError
from xloom.settings import LimitSettings

BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LEAST, _MOST = -(2**63), 2**63 - 1  # what crosses to a replica, and what engines count in
_TOKENS = ("prompt", "tokens", "token_ids", "prompt_token_ids", "allowed_token_ids")
_TEXTS = ("prompt", "messages", "input", "system", "instructions", "suffix")
_STOPS = ("stop", "stop_sequences", "bad_words", "stop_token_ids")
_SCHEMAS = (
    "response_format",
    "structured_outputs",
    "text",
    "output_config",
    "output_format",
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "vllm_xargs",
)
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
_VALUES = ("log-probabilities in one answer", "logprob_values")


def check_body(body: bytes, limits: LimitSettings) -> Any:
    """What a JSON body says.

    Raises `XloomError` on what is no JSON, could not be sent to a replica, or asks for more than the limits.
    """
    document = _decode(body)
    if isinstance(document, dict):
        tokens = sum(_tokens(name, document[name]) for name in _TOKENS if name in document)
        _limit(tokens, limits.token_ids, "token ids", "token_ids")
        rest = {name: value for name, value in document.items() if name not in _TOKENS or not _is_tokens(value)}
        _check_shape(rest, limits)
        _check_fields(document, limits, tokens)
        if isinstance(nested := document.get("sampling_params"), dict):
            _check_fields(nested, limits, tokens)
    else:
        _check_shape(document, limits)
    return document


def _is_tokens(value: Any) -> bool:
    """Whether a value is a list of token ids, or begins as a list of such lists."""
    first = value[0] if isinstance(value, list) and value else None
    return type(first) is int or (isinstance(first, list) and bool(first) and type(first[0]) is int)


def _tokens(name: str, value: Any) -> int:
    """How many token ids a value has. One that is none among many would cost pydantic an error for each of them."""
    if not _is_tokens(value):
        return 0
    rows = value if isinstance(value[0], list) else [value]
    for row in rows:
        if not isinstance(row, list) or not all(type(token) is int and 0 <= token <= _MOST for token in row):
            raise XloomError("invalid_request", f"`{name}` must be text or token ids, not both.", "Mend the list.")
    return sum(map(len, rows))


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise XloomError("limit_exceeded", "The body is nested too deep.", "Nest less.") from None
    except msgspec.MsgspecError as error:
        if _SURROGATE.search(body):
            what = "The body has half of a surrogate pair (\\ud800 to \\udfff), or is cut short."
        else:
            what = f"The body is not JSON: {error}."
        raise XloomError("invalid_request", what, "Send UTF-8 JSON.") from None


def _check_shape(document: Any, limits: LimitSettings) -> None:
    """Depth, number of values and size of whole numbers."""
    count, depth, level = 1, 0, [document]
    while level:
        depth += 1
        deeper: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is int or (kind is float and value.is_integer()):
                if not _LEAST <= value <= _MOST:
                    raise XloomError(
                        "invalid_request", "A number in the body is beyond 64 bits.", "Send a smaller one."
                    )
            elif kind is list:
                deeper.extend(value)
            elif kind is dict:
                deeper.extend(value.values())
        count += len(deeper)
        _limit(count, limits.json_values, "values in the body", "json_values")
        level = deeper
        if deeper:
            _limit(depth, limits.json_depth, "levels in the body", "json_depth")


def _check_fields(fields: dict[str, Any], limits: LimitSettings, tokens: int) -> None:
    characters = sum(_characters(fields[name]) for name in _TEXTS if name in fields)
    _limit(characters, limits.prompt_characters, "characters of text", "prompt_characters")
    prompts, messages = _prompts(fields), _messages(fields)
    _limit(prompts, limits.prompts, "prompts in one request", "prompts")
    _limit(messages, limits.messages, "messages in one request", "messages")
    parts = sum(_objects(fields[name]) for name in _TEXTS if name in fields)
    _limit(parts, limits.message_parts, "messages, parts of them and calls of tools", "message_parts")
    n = max([1, *_numbers(fields, ("n", "best_of"))])
    _limit(n, limits.n, "answers to one prompt (`n`)", "n")
    _limit(prompts * n, limits.sequences, "sequences (prompts times `n`)", "sequences")
    for name in _LOGPROBS:
        for wanted in _numbers(fields, (name,)):
            if wanted == -1:
                cure = f"Ask for at most {limits.logprobs}."
                raise XloomError("limit_exceeded", f"`{name}` of the whole vocabulary can't be had.", cure)
            _limit(wanted, limits.logprobs, f"candidates (`{name}`)", "logprobs")
    _limit(_logprobs(fields, prompts * n, tokens + characters // 2), limits.logprob_values, *_VALUES)
    if fields.get("return_token_strs"):
        what = "characters, eightfold as `return_token_strs` makes a string of each"
        _limit(8 * characters, limits.prompt_characters, what, "prompt_characters")
    for name in _STOPS:
        if isinstance(stops := fields.get(name), list):
            _limit(len(stops), limits.stop_strings, f"entries of `{name}`", "stop_strings")
        for stop in stops if isinstance(stops, list) else [stops]:
            if isinstance(stop, str):
                _limit(len(stop), limits.stop_characters, f"characters in one of `{name}`", "stop_characters")
    if isinstance(bias := fields.get("logit_bias"), dict):
        _limit(len(bias), limits.logit_bias, "tokens in `logit_bias`", "logit_bias")
    if isinstance(tools := fields.get("tools"), list):
        _limit(len(tools), limits.tools, "tools", "tools")
    for name in _SCHEMAS:
        if isinstance(schema := fields.get(name), (dict, list, str)):
            _limit(len(msgspec.json.encode(schema)), limits.schema_bytes, f"bytes of `{name}`", "schema_bytes")
    _check_structured(fields.get("structured_outputs"))


def _check_structured(wanted: Any) -> None:
    """The types that vLLM 0.32 takes for granted (`vllm.sampling_params.StructuredOutputsParams`)."""
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        raise XloomError("invalid_request", "`structured_outputs` must be an object.", "Send one, with a schema say.")
    choice = wanted.get("choice")
    if choice is not None and not (isinstance(choice, list) and all(isinstance(each, str) for each in choice)):
        raise XloomError("invalid_request", "`structured_outputs.choice` must be a list of strings.", "Send a list.")
    for name in ("regex", "grammar", "structural_tag"):
        if not isinstance(wanted.get(name), (str, type(None))):
            raise XloomError("invalid_request", f"`structured_outputs.{name}` must be a string.", "Send a string.")
    if not isinstance(wanted.get("json"), (str, dict, type(None))):
        raise XloomError("invalid_request", "`structured_outputs.json` must be a JSON schema.", "Send an object.")


def _logprobs(fields: dict[str, Any], sequences: int, prompt: int) -> int:
    """How many log-probabilities one answer may hold: of prompts of so many tokens, and of what is generated.

    Each takes 4 us and 1 kB until it is JSON. Those of a prompt that a stream echoes become JSON in one go.
    """
    sampled = max([-1, *_numbers(fields, ("logprobs", "top_logprobs")), 0 if fields.get("logprobs") is True else -1])
    sampled = max(sampled, len(listed) if isinstance(listed := fields.get("logprob_token_ids"), list) else -1)
    of_prompt = max([-1, *_numbers(fields, ("prompt_logprobs",)), sampled if fields.get("echo") is True else -1])
    length = max([16, *_numbers(fields, _LENGTHS)])
    copies = max([1, *_numbers(fields, ("n", "best_of"))])
    generated = sequences * length * (sampled + 1)  # where no length is given, the engine client sets one
    return max(generated, prompt * copies * (of_prompt + 1) * (16 if fields.get("stream") is True else 1))


def sequences_of(fields: dict[str, Any]) -> int:
    """How many answers a body asks for: prompts times `n`."""
    return _prompts(fields) * max([1, *_numbers(fields, ("n", "best_of"))])


def has_length(fields: dict[str, Any]) -> bool:
    """Whether a body says how long an answer may be."""
    return bool(_numbers(fields, _LENGTHS))


def _characters(value: Any) -> int:
    """Of all strings in a value."""
    total, rest = 0, [value]
    while rest:
        each = rest.pop()
        if isinstance(each, str):
            total += len(each)
        elif isinstance(each, list):
            if each and type(each[0]) is not int:  # token ids are no text
                rest.extend(each)
        elif isinstance(each, dict):
            rest.extend(each.values())
    return total


def _objects(value: Any) -> int:
    """Of all lists in a value."""
    total, rest = 0, [value]
    while rest:
        each = rest.pop()
        if isinstance(each, list):
            if each and type(each[0]) is not int:
                total += sum(isinstance(entry, dict) for entry in each)
                rest.extend(each)
        elif isinstance(each, dict):
            rest.extend(each.values())
    return total


def _prompts(fields: dict[str, Any]) -> int:
    """Prompts of a completion, or conversations of a batch."""
    several = [fields.get(name) for name in ("prompt", "messages")]
    counts = [len(each) for each in several if isinstance(each, list) and each and isinstance(each[0], (list, str))]
    return max([1, *counts])


def _messages(fields: dict[str, Any]) -> int:
    total = 0
    for name in ("messages", "input"):
        if isinstance(listed := fields.get(name), list):
            total += sum(len(each) if isinstance(each, list) else 1 for each in listed)
    return total


def _numbers(fields: dict[str, Any], names: Iterable[str]) -> list[int]:
    return [value for name in names if type(value := fields.get(name)) is int]


def _limit(found: int, most: int, what: str, setting: str) -> None:
    if found > most:
        cure = f"Ask for at most {most}, or have the operator raise `router.limits.{setting}`."
        raise XloomError("limit_exceeded", f"Too many {what}: {found}.", cure)
