"""relevo chat: a conversation in the terminal, or one answer in a pipe."""

from __future__ import annotations

import os
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from relevo.core.errors import RelevoError
from relevo.terminal.conversation import HELP, Conversation, show_params, split_settings
from relevo.terminal.endpoint import Answer, Endpoint

PROMPT, MORE = "> ", ". "
_ONCE_MORE = "Ctrl-C once more ends"
_QUOTES = '"""'
_HISTORY_LINES = 1000
_DIM, _RED, _PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"


def answer_once(endpoint: Endpoint, conversation: Conversation, question: str, out: TextIO) -> None:
    """The answer's text and a newline, nothing else. Raises RelevoError."""
    answer = Answer()

    def write(text: str) -> None:
        out.write(_printable(text))
        out.flush()

    endpoint.chat(conversation.body(question), answer, write)
    if not answer.text.endswith("\n"):
        write("\n")


class Chat:
    """At a terminal: reads lines, writes answers, until the user has enough."""

    def __init__(self, endpoint: Endpoint, conversation: Conversation) -> None:
        self._endpoint = endpoint
        self._conversation = conversation
        self._colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._was_interrupted = False  # and nothing was entered since

    def run(self) -> None:
        print(f"{self._conversation.model} at {self._endpoint.url}. /help tells what else there is.")
        history = _open_history()
        try:
            while (text := self._read()) is not None and self._do(text):
                pass
        finally:
            if history is not None:
                _save_history(history)

    def _read(self) -> str | None:
        """One message, of one line or several. None: the user is done."""
        while True:
            try:
                text = _read_message()
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                if self._was_interrupted:
                    return None
                self._note_interrupt(_ONCE_MORE)
            else:
                self._was_interrupted = False
                return text

    def _do(self, text: str) -> bool:
        """False: that was the end."""
        try:
            if text.startswith("/"):
                return self._obey(text)
            if text.strip():
                self._ask(text)
        except KeyboardInterrupt:  # between two things
            self._note_interrupt(_ONCE_MORE)
        return True

    def _ask(self, question: str) -> None:
        answer = Answer()
        try:
            self._endpoint.chat(self._conversation.body(question), answer, self._write)
        except KeyboardInterrupt:
            self._finish_line(answer)
            self._note_interrupt(f"stopped; {_ONCE_MORE}")
        except RelevoError as error:
            self._finish_line(answer)
            self._complain(error.message)
            if not answer.text:
                return  # nothing was said: it can be asked again, with other parameters
        else:
            self._finish_line(answer)
            self._dim(_describe(answer))
        self._conversation.add(question, answer.text)

    def _obey(self, text: str) -> bool:
        """False: it was /quit."""
        command, _, rest = text.partition(" ")
        rest = rest.strip()
        conversation = self._conversation
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            print(HELP)
        elif command == "/clear":
            conversation.messages.clear()
            self._dim("the conversation is forgotten")
        elif command == "/system":
            if rest:
                conversation.system = "" if rest == "-" else rest
            print(conversation.system or "there is no system prompt")
        elif command == "/params":
            try:
                conversation.set_params(split_settings(rest))
            except RelevoError as error:
                self._complain(error.message)
            print(show_params(conversation.params) or "no parameters: the endpoint's defaults apply")
        else:
            self._complain(f"there is no {command}; /help tells what there is")
        return True

    def _write(self, text: str) -> None:
        sys.stdout.write(_printable(text))
        sys.stdout.flush()

    def _finish_line(self, answer: Answer) -> None:
        if answer.text and not answer.text.endswith("\n"):
            print()

    def _note_interrupt(self, text: str) -> None:
        self._was_interrupted = True
        self._dim(text)

    def _dim(self, text: str) -> None:
        print(f"{_DIM}[{text}]{_PLAIN}" if self._colours else f"[{text}]", flush=True)

    def _complain(self, text: str) -> None:
        text = _printable(text)
        print(f"{_RED}{text}{_PLAIN}" if self._colours else text, flush=True)


def _read_message() -> str:
    line = input(PROMPT)
    if line.strip() == _QUOTES:
        lines = []
        while (line := input(MORE)).strip() != _QUOTES:
            lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(MORE))
    return "\n".join(lines)


def _describe(answer: Answer) -> str:
    parts = [] if answer.num_tokens is None else [f"{answer.num_tokens} tokens"]
    if answer.ttft_seconds is not None:
        parts.append(f"first after {1e3 * answer.ttft_seconds:.0f} ms")
        later = answer.seconds - answer.ttft_seconds
        if answer.num_tokens is not None and answer.num_tokens > 1 and later > 0:
            parts.append(f"{(answer.num_tokens - 1) / later:.0f} tokens/s")
    if answer.finish_reason == "length":
        parts.append("cut off by its length: max_tokens, or the model's context")
    return ", ".join(parts) or "an empty answer"


def _printable(text: str) -> str:
    """Without control characters: what a model writes must not command the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def _open_history() -> Path | None:
    """Line editing, where Python has it, with the lines of earlier conversations. None: nothing is kept."""
    try:
        import readline
    except ImportError:
        return None
    readline.parse_and_bind("set enable-bracketed-paste on")  # several lines that are pasted are one message
    readline.set_history_length(_HISTORY_LINES)
    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "relevo" / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    return path


def _save_history(path: Path) -> None:
    """For this user's eyes alone. Where it cannot be written, it isn't."""
    import readline

    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
        readline.write_history_file(path)
