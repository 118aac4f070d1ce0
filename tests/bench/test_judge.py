"""Judges: an endpoint against a local server, a reward model, and the order of answers cancelled."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.bench.places import tiny_encoder

from reftune.bench.judge import EndpointJudge, RewardJudge, UnreadableError, check_judge, make_judge, verdict, win_rate


class Server(HTTPServer):
    """Answers as `reply` says; `codes` are errors to give first."""

    asked: list[dict[str, Any]]
    codes: list[int]
    keys: list[str | None]
    reply: str | None
    raw: list[bytes]  # to give first, as they are


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, **body})
        self.server.keys.append(self.headers.get("Authorization"))
        code = self.server.codes.pop(0) if self.server.codes else 200
        reply = {"choices": [{"message": {"content": self.server.reply}}]}
        data = json.dumps(reply if code == 200 else {"error": "wait"}).encode()
        self.send_response(code)
        if self.server.raw:
            data = self.server.raw.pop(0)
            self.send_header("Content-Length", str(len(data) + (data == b"{")))  # broken off
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked, made.codes, made.keys, made.reply = [], [], [], "A"
    made.raw = []
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def judge(server: Server, **kwargs: Any) -> EndpointJudge:
    return EndpointJudge(f"http://127.0.0.1:{server.server_port}/v1/", "m", key_env=None, pause=0.01, **kwargs)


def test_an_endpoint_is_asked_in_both_orders(server: Server) -> None:
    assert win_rate(judge(server), ["Do it."], ["mine"], ["theirs"]) == {
        "win_rate": 0.5
    }  # it likes the first place: no win
    first, second = (call["messages"][0]["content"] for call in server.asked)
    assert first.index("mine") < first.index("theirs")
    assert second.index("theirs") < second.index("mine")
    assert "Do it." in first
    assert {(call["path"], call["model"], call["temperature"]) for call in server.asked} == {
        ("/v1/chat/completions", "m", 0)
    }
    assert server.keys == [None, None]


def test_errors_of_an_endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.codes = [429, 503]
    assert judge(server).prefers("i", "a", "b") == 1.0
    assert len(server.asked) == 3
    server.codes = [401]
    with pytest.raises(ValueError, match="refused the request, 401"):
        judge(server).prefers("i", "a", "b")
    server.codes = [500, 500]
    with pytest.raises(ConnectionError, match=r"2 attempts.*500"):
        judge(server, retries=1).prefers("i", "a", "b")
    server.raw = [b"{", b"<html>a proxy's page</html>", b"\xff"]
    assert judge(server).prefers("i", "a", "b") == 1.0
    server.raw = [b"<html>a proxy's page</html>"] * 2
    with pytest.raises(ConnectionError, match=r"2 attempts: what it gave is no JSON"):
        judge(server, retries=1).prefers("i", "a", "b")
    server.asked.clear()
    server.reply = "Both are fine"
    with pytest.raises(UnreadableError, match="neither A, B nor tie"):
        judge(server).prefers("i", "a", "b")
    assert [call["temperature"] for call in server.asked] == [0, 1]  # asked twice
    server.reply = None
    with pytest.raises(UnreadableError):
        judge(server).prefers("i", "a", "b")
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ValueError, match=r"\$NO_KEY, which is not set"):
        EndpointJudge("http://x", "m", key_env="NO_KEY")


def test_the_key_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    settings = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "key_env": "MY_KEY"}
    made = make_judge(settings)
    assert made is not None
    made.prefers("i", "a", "b")
    assert server.keys == ["Bearer secret"]


def test_verdicts() -> None:
    said = {"A": 1.0, "b.": 0.0, "Tie": 0.5, "**B**": 0.0, "Answer: A": 1.0, "A tie.": 0.5, "I prefer B, clearly.": 0.0}
    said |= {"Both A and B are fine: tie": 0.5, "A is longer.\n\nB": 0.0}
    said |= {"<think>A is shorter</think>B": 0.0, "<think>B?\nB!</think>\nA": 1.0}
    assert {text: verdict(text) for text in said} == said
    for text in (
        "",
        "Both are fine",
        "B is better than A, or a tie",
        "<think>A, as it seems",
        "A is better than B",
        "A person would like B",
    ):
        with pytest.raises(UnreadableError):
            verdict(text)


def test_a_few_replies_without_a_verdict_are_ties_and_many_an_error() -> None:
    class Silent:
        name, calls = "silent", 0

        def prefers(self, instruction: str, a: str, b: str) -> float:
            self.calls += 1
            if a == "never" or self.calls == 3:
                raise UnreadableError("hm")
            return 1.0

    answers = [str(i) for i in range(10)]
    found = win_rate(Silent(), answers, answers, ["-"] * 10)
    assert found == {"win_rate": pytest.approx((10 * 1 - 0.5) / 20), "unreadable": 1 / 20}
    with pytest.raises(UnreadableError, match="3 of 4 replies had no verdict; the last: hm"):
        win_rate(Silent(), ["never"] * 10, ["never"] * 10, ["-"] * 10)


def reward_model(folder: Path, **settings: Any) -> RewardJudge:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    source = tiny_encoder(folder / "encoder")
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.classifier.weight.data.mul_(100)
    model.save_pretrained(source)
    made = make_judge({"reward_model": str(source), **settings})
    assert isinstance(made, RewardJudge)
    return made


def test_a_reward_model_prefers_the_higher_reward(tmp_path: Path) -> None:
    made = reward_model(tmp_path)
    a, b = made.reward("do it", "yes"), made.reward("do it", "no no no")
    assert a != b
    assert made.prefers("do it", "yes", "no no no") == float(a > b)
    assert made.prefers("do it", "yes", "yes") == 0.5
    assert win_rate(made, ["do it"], ["yes"], ["no no no"]) == {"win_rate": float(a > b)}


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }} {% endfor %}"])
def test_a_long_instruction_does_not_push_the_answer_out_of_a_reward(tmp_path: Path, template: str | None) -> None:
    made = reward_model(tmp_path, max_length=16)
    made.tokenizer.chat_template = template
    long = "do it " * 40
    assert made.reward(long, "yes") != made.reward(long, "no no no")


def test_mistakes_in_the_settings() -> None:
    assert make_judge(None) is None
    check_judge(None)
    for wrong in (
        {"url": "http://x"},
        {"url": "http://x", "model": "m", "speed": 3},
        {"reward_model": "no such folder", "max_len": 9},
    ):
        for read in (make_judge, check_judge):
            with pytest.raises(ValueError, match=r"scoring\.judge is"):
                read(wrong)
