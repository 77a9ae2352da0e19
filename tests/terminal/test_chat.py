"""relevo chat in a terminal and in a pipe, against an endpoint that says what it is told to say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from relevo.core.errors import InvalidRequest
from relevo.terminal.conversation import Conversation, parse_params, split_settings
from tests.terminal.fake import BREAK, HOLD, FakeEndpoint, running_endpoint
from tests.terminal.terminal import CTRL_C, CTRL_D, Terminal, terminal

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with running_endpoint() as endpoint:
        yield endpoint


def chat(endpoint: FakeEndpoint, folder: Path, *options: str) -> AbstractContextManager[Terminal]:
    return terminal("chat", "--url", endpoint.url, *options, XDG_STATE_HOME=str(folder))


def piped(endpoint: FakeEndpoint, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "relevo.cli", "chat", "--url", endpoint.url, *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def contents(body: dict[str, list[dict[str, str]]]) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in body["messages"]]


def test_conversation(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    """One terminal for all of it: a start takes a second."""
    with chat(endpoint, tmp_path, "--system", "Be brief.", "--param", "seed=7") as user:
        user.expect("fake at http")
        user.expect("> ")

        endpoint.answers.put(["Four", ", I ", "think."])
        user.type("2+2?\n")
        user.expect("Four, I think.\n[3 tokens, first after ")
        user.expect("> ")
        assert contents(endpoint.bodies[-1]) == ["system: Be brief.", "user: 2+2?"]
        assert endpoint.bodies[-1]["seed"] == 7

        user.type('/params temperature=0 stop=["\\n\\n", "x y"] seed=\n')
        user.expect('temperature=0 stop=["\\n\\n", "x y"]\n> ')
        user.type("/system Answer in verse.\n")
        user.expect("\nAnswer in verse.\n> ")
        endpoint.answers.put(["Sure\x1b[2J."])
        user.type("one \\\n")
        user.expect("\n. ")
        user.type("two\n")
        assert "Sure[2J.\n" in user.expect("1 tokens"), "without what would clear the screen"
        user.expect("> ")
        body = endpoint.bodies[-1]
        assert contents(body)[1:] == ["user: 2+2?", "assistant: Four, I think.", "user: one \ntwo"]
        assert (contents(body)[0], body["temperature"], "seed" in body) == ("system: Answer in verse.", 0, False)

        endpoint.answers.put((400, {"error": {"message": "temperature must be at most 2", "param": "temperature"}}))
        user.type('"""\n')
        user.expect("\n. ")
        user.type("a\n")
        user.expect("\n. ")
        user.type('"""\n')
        user.expect("temperature must be at most 2\n> ")
        assert contents(endpoint.bodies[-1])[-1] == "user: a"

        user.type("/clear\n")
        user.expect("forgotten]\n> ")
        user.type("/what\n")
        user.expect("there is no /what; /help tells what there is\n> ")
        user.type("/help\n")
        user.expect("/params NAME=VALUE")
        user.expect("> ")
        endpoint.answers.put(["Hm"])
        user.type("again\n")
        user.expect("Hm\n[")
        user.expect("> ")
        assert contents(endpoint.bodies[-1]) == ["system: Answer in verse.", "user: again"], "what failed is not in it"

        user.type("\x1b[A\x1b[A")  # up twice: the line before
        user.expect("/help")
        user.type("\x15/quit\n")
        assert user.end()[0] == 0
    history = tmp_path / "relevo" / "chat_history"
    assert "2+2?\n" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_stops_the_answer_and_a_second_one_ends(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    with chat(endpoint, tmp_path) as user:
        user.expect("> ")
        endpoint.answers.put(["Once upon", HOLD])
        user.type("a story\n")
        user.expect("Once upon")
        user.type(CTRL_C)
        user.expect("[stopped; Ctrl-C once more ends]\n> ")
        assert endpoint.left.wait(20), "the endpoint is told"

        endpoint.answers.put([" a time"])
        user.type("go on\n")
        user.expect(" a time\n[")
        user.expect("> ")
        assert contents(endpoint.bodies[-1]) == ["user: a story", "assistant: Once upon", "user: go on"]

        user.type("half a line" + CTRL_C)
        user.expect("[Ctrl-C once more ends]\n> ")
        user.type("/clear\n")
        user.expect("forgotten]\n> ")
        user.type(CTRL_C)
        user.expect("[Ctrl-C once more ends]\n> ")
        user.type(CTRL_C)
        assert user.end()[0] == 0


def test_ctrl_d_ends(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    with chat(endpoint, tmp_path) as user:
        user.expect("> ")
        user.type(CTRL_D)
        assert user.end()[0] == 0


def test_broken_answer_is_told_and_kept(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    with chat(endpoint, tmp_path) as user:
        for broken in (["So far", BREAK], ["So far", {"error": {"message": "the worker is gone"}}]):
            user.expect("> ")
            endpoint.answers.put(broken)
            user.type("well?\n")
            user.expect("So far\n")
            user.expect("the answer broke off: ")
        user.expect("the worker is gone\n> ")
        assert contents(endpoint.bodies[-1]) == ["user: well?", "assistant: So far", "user: well?"]


def test_pipe_gets_the_answer_and_nothing_else(endpoint: FakeEndpoint) -> None:
    endpoint.answers.put(["An", "swer"])
    result = piped(endpoint, "first line\nsecond\n", "Sum up:", "--param", "max_tokens=5", "--api-key", "secret")
    assert (result.returncode, result.stdout, result.stderr) == (0, "Answer\n", "")
    assert contents(endpoint.bodies[0]) == ["user: Sum up:\n\nfirst line\nsecond"]
    assert endpoint.bodies[0]["max_tokens"] == 5
    assert endpoint.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("models", "answer", "said"),
    [
        ((401, {"error": {"message": "no key"}}), None, "no key (give --api-key, or RELEVO_API_KEY)"),
        ((200, "<html>"), None, "does not answer in JSON"),
        ((200, {"data": []}), None, "serves no model"),
        ((502, "<h1>Bad\nGateway</h1>"), None, "502: <h1>Bad Gateway</h1>"),
        ((200, {"data": [{"id": "a"}]}), (503, {"error": {"message": "no worker"}}), "503: no worker"),
        ((200, {"data": [{"id": "a"}]}), ["a", BREAK], "the answer broke off: the stream ended without [DONE]"),
    ],
)
def test_failure_is_one_line_and_exit_code_1(
    endpoint: FakeEndpoint, models: tuple[int, object], answer: object, said: str
) -> None:
    endpoint.pages["/v1/models"] = models
    if answer is not None:
        endpoint.answers.put(answer)  # type: ignore[arg-type]  # the parameters' types differ
    result = piped(endpoint, "hello")
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("relevo: error: ")
    assert said in line


def test_nobody_there_says_how_to_start_one() -> None:
    command = [sys.executable, "-m", "relevo.cli", "chat", "--url", "http://127.0.0.1:1", "hello"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    assert "nobody answers at http://127.0.0.1:1" in result.stderr
    assert "relevo serve" in result.stderr


def test_ctrl_c_in_a_pipe_is_no_traceback(endpoint: FakeEndpoint) -> None:
    endpoint.answers.put(["a line\n", HOLD])
    read, write = os.pipe()
    command = [sys.executable, "-m", "relevo.cli", "chat", "--url", endpoint.url, "hello"]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    os.close(write)
    assert os.read(read, 100) == b"a line\n"
    os.close(read)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == ""


def test_reader_that_has_enough_is_no_error(endpoint: FakeEndpoint) -> None:
    endpoint.answers.put(["a line\n"] * 20)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "relevo.cli", "chat", "--url", endpoint.url, "hello"]
    result = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False, stdin=subprocess.DEVNULL
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (1, b"")


def test_settings_are_split_at_spaces_outside_of_json() -> None:
    text = ' temperature=0.7  stop=["a b", "\\" ]"] response_format={"type": "text"} name=plain '
    split = split_settings(text)
    assert split == ["temperature=0.7", 'stop=["a b", "\\" ]"]', 'response_format={"type": "text"}', "name=plain"]
    assert parse_params(split) == {
        "temperature": 0.7,
        "stop": ["a b", '" ]'],
        "response_format": {"type": "text"},
        "name": "plain",
    }


@pytest.mark.parametrize("setting", ["temperature", "=1", "a b=1", "messages=[]", "stream=false"])
def test_bad_parameter_changes_none(setting: str) -> None:
    conversation = Conversation("fake", params={"seed": 1})
    with pytest.raises(InvalidRequest):
        conversation.set_params(["temperature=1", setting])
    assert conversation.params == {"seed": 1}
