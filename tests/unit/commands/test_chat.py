"""`xloom chat` and `xloom generate` over a model that answers what it is told to."""

from __future__ import annotations

import io
import json
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from xloom.commands.chat import chat
from xloom.commands.generate import generate, words_of
from xloom.commands.opening import opened
from xloom.commands.text_model import Answer, Message, Options, TextModel
from xloom.protocol import XloomError

OPTIONS = Options(max_tokens=5)


class Parrot(TextModel):
    """Repeats the newest message, word by word."""

    names = ["base", "code", "blend"]
    default = "blend"

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], str, Options]] = []
        self.interrupt = False
        self.stopped = 0

    def prepare(self, model: str) -> None:
        pass

    def chat(self, messages: Sequence[Message], model: str, options: Options) -> Answer:
        self.asked.append((list(messages), model, options))
        return self.complete(messages[-1]["content"], model, options)

    def complete(self, prompt: str, model: str, options: Options) -> Answer:
        answer = Answer(model)
        answer.pieces = self._pieces(answer, prompt)
        return answer

    def _pieces(self, answer: Answer, prompt: str) -> Generator[str, None, None]:
        try:
            for word in prompt.split():
                if word == "refuse":
                    raise XloomError("refused", "No.")
                answer.num_tokens += 1
                yield f"{word} "
                if self.interrupt:
                    raise KeyboardInterrupt
            answer.finish_reason = "stop"
        finally:
            self.stopped += 1

    def close(self) -> None:
        pass


@pytest.fixture
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str | BaseException]:
    """What is typed at the prompt, line by line; then the input ends."""
    lines: list[str | BaseException] = []

    def read(prompt: str) -> str:
        line = lines.pop(0) if lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    return lines


def test_one_message_is_answered_by_the_default_model(parrot: Parrot, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(parrot, "hello there", None, "be kind", OPTIONS, as_json=False) == 0
    assert capsys.readouterr().out == "hello there \n"
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]
    assert parrot.asked == [(messages, "blend", OPTIONS)]


def test_a_message_may_be_fed_through_stdin(
    parrot: Parrot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a\npipe"))
    chat(parrot, None, "code", None, OPTIONS, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"model": "code", "text": "from a pipe ", "finish_reason": "stop", "num_tokens": 3}


def test_a_conversation_remembers_until_it_is_reset(
    parrot: Parrot, typed: list[str | BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    typed += ["one", "", "two", "/reset", "three"]
    chat(parrot, None, None, "be kind", OPTIONS, as_json=False)
    roles = [[message["role"] for message in messages] for messages, _, _ in parrot.asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert parrot.asked[1][0][2]["content"] == "one "
    assert "A new conversation." in capsys.readouterr().out


def test_the_model_can_be_changed_and_a_wrong_name_lists_those_there_are(
    parrot: Parrot, typed: list[str | BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    typed += ["/model", "/model code", "hello", "/model cod", "/what", "/help", "/quit", "never said"]
    chat(parrot, None, None, None, OPTIONS, as_json=False)
    assert [model for _, model, _ in parrot.asked] == ["code"]
    printed = capsys.readouterr()
    assert "* blend" in printed.out
    assert "There is no /what" in printed.out
    assert "/reset" in printed.out
    assert "base, code, blend" in printed.err


def test_ctrl_c_ends_the_answer_then_the_program(
    parrot: Parrot, typed: list[str | BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    parrot.interrupt = True
    typed += ["a long answer", KeyboardInterrupt(), "never said"]
    assert chat(parrot, None, None, None, OPTIONS, as_json=False) == 0
    assert "(stopped)" in capsys.readouterr().out
    assert (len(parrot.asked), parrot.stopped) == (1, 1)


def test_an_error_leaves_the_conversation_as_it_was(
    parrot: Parrot, typed: list[str | BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    typed += ["refuse", "go on"]
    chat(parrot, None, None, None, OPTIONS, as_json=False)
    assert "No. [refused]" in capsys.readouterr().err
    assert [message["content"] for message in parrot.asked[-1][0]] == ["go on"]


def test_an_unknown_model_is_named_with_those_there_are(parrot: Parrot) -> None:
    with pytest.raises(XloomError) as caught:
        chat(parrot, "hello", "cod", None, OPTIONS, as_json=False)
    assert (caught.value.code, caught.value.cure) == ("model_not_found", "There are: base, code, blend.")


def test_generate_continues_the_prompt(parrot: Parrot, capsys: pytest.CaptureFixture[str]) -> None:
    generate(parrot, "once upon", None, OPTIONS, as_json=True)
    assert json.loads(capsys.readouterr().out)["model"] == "blend"
    generate(parrot, "once upon", "base", OPTIONS, as_json=False)
    assert capsys.readouterr().out == "once upon \n"


@pytest.mark.parametrize(
    ("words", "prompt", "expected"),
    [
        (["text"], None, (None, "text")),
        (["s.yaml", "text"], None, (Path("s.yaml"), "text")),
        (["s.yaml"], "text", (Path("s.yaml"), "text")),
        ([], "s.yaml", (None, "s.yaml")),
        (["-"], None, (None, "piped")),
        (["s.yaml", "-"], None, (Path("s.yaml"), "piped")),
        ([], None, (None, "piped")),
    ],
)
def test_settings_and_prompt_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, words: list[str], prompt: str | None, expected: tuple[Path | None, str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert words_of(words, prompt) == expected


def test_no_prompt_at_a_terminal_and_too_many_words_are_refused(typed: list[str | BaseException]) -> None:
    for words in ([], ["a", "b", "c"]):
        with pytest.raises(XloomError) as caught:
            words_of(words, None)
        assert caught.value.code == "no_prompt"


def test_settings_and_a_url_are_two_models(tmp_path: Path) -> None:
    with pytest.raises(XloomError) as caught, opened(tmp_path / "s.yaml", "http://127.0.0.1:1", None, None):
        pass
    assert caught.value.code == "two_models"
