"""A model behind a URL: the OpenAI API of an xloom endpoint, streamed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from xloom.commands.endpoint import Endpoint
from xloom.commands.text_model import Answer, Message, Options, TextModel
from xloom.protocol import MIXTURES, XloomError


class RemoteModel(TextModel):
    """The models an endpoint serves."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        answer = endpoint.get("/v1/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not cards:
            cure = "Is this the URL of an OpenAI-compatible endpoint?"
            raise XloomError("not_an_xloom_endpoint", f"{endpoint.url} lists no models.", cure)
        self.names = [str(card["id"]) for card in cards]
        mixtures = [name for name, card in zip(self.names, cards, strict=True) if card.get("kind") in MIXTURES]
        self.default = mixtures[0] if mixtures else self.names[0]

    def prepare(self, model: str) -> None:
        """The endpoint has it ready."""

    def chat(self, messages: Sequence[Message], model: str, options: Options) -> Answer:
        return self._answer("/v1/chat/completions", model, options, {"messages": list(messages)})

    def complete(self, prompt: str, model: str, options: Options) -> Answer:
        return self._answer("/v1/completions", model, options, {"prompt": prompt})

    def _answer(self, path: str, model: str, options: Options, body: dict[str, Any]) -> Answer:
        answer = Answer(self.named(model))
        body |= {
            "model": answer.model,
            "max_tokens": options.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.temperature is not None:
            body["temperature"] = options.temperature
        answer.pieces = self._pieces(answer, path, body)
        return answer

    def _pieces(self, answer: Answer, path: str, body: dict[str, Any]) -> Generator[str, None, None]:
        for event in self._endpoint.stream(path, body):
            answer.num_tokens = (event.get("usage") or {}).get("completion_tokens", answer.num_tokens)
            for choice in event.get("choices") or ():
                answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                piece = choice.get("text") or (choice.get("delta") or {}).get("content")
                if piece:
                    yield piece

    def close(self) -> None:
        """Nothing was started."""
