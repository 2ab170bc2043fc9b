"""`xloom chat`: a conversation with a model in this process or behind a URL."""

from __future__ import annotations

import contextlib
import sys

from xloom.commands.generate import show
from xloom.commands.text_model import Message, Options, TextModel
from xloom.protocol import XloomError

HELP = """/model        the models there are
/model NAME   talk to another one; the conversation stays
/reset        begin anew
/help         this
/quit         end, as do Ctrl-D and Ctrl-C; Ctrl-C during an answer ends the answer"""


class Conversation:
    """What was said, and to whom."""

    def __init__(self, source: TextModel, model: str, system: str | None, options: Options, *, as_json: bool) -> None:
        self._source, self._options, self._as_json = source, options, as_json
        self.model = model
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def say(self, text: str) -> None:
        """Send a message and print the answer. Raises `XloomError`, and forgets the message then."""
        messages = [*self._messages, {"role": "user", "content": text}]
        answer = show(self._source.chat(messages, self.model, self._options), as_json=self._as_json)
        self._messages = [*messages, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says. Raises `XloomError` (model_not_found)."""
        word, _, argument = line.partition(" ")
        if word == "/reset":
            self._messages = list(self._opening)
            print("A new conversation.")
        elif word == "/model" and argument.strip():
            self.model = self._source.named(argument.strip())
        elif word == "/model":
            print(*(f"* {name}" if name == self.model else f"  {name}" for name in self._source.names), sep="\n")
        elif word == "/help":
            print(HELP)
        else:
            print(f"There is no {word}. /help lists what there is.")


def chat(
    source: TextModel, message: str | None, model: str | None, system: str | None, options: Options, *, as_json: bool
) -> int:
    """Answer one message, from the command line or from what stdin is fed, or talk until told to end."""
    conversation = Conversation(source, source.named(model), system, options, as_json=as_json)
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read()
    if message is not None:
        conversation.say(message)
        return 0
    talk(conversation)
    return 0


def talk(conversation: Conversation) -> None:
    """Read lines and answer them until the end of input, /quit, or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history
    print("/help lists the commands, Ctrl-D ends.")
    while True:
        try:
            line = input(f"{conversation.model}> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                conversation.command(line)
            elif line:
                conversation.say(line)
        except KeyboardInterrupt:
            print("\n(stopped)")
        except XloomError as error:
            print(error, file=sys.stderr)
