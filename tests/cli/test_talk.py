"""Answers: batched as alone, ended or cut, streamed as generated, compared with the base."""

from pathlib import Path

import pytest
import torch
from tests.tiny_chat import save_tiny, tiny_model, tiny_tokenizer

import reftune
from reftune import ReftConfig, get_reft_model
from reftune.cli.talk import Talker, answer, chat, open_model, reply, stream
from reftune.data import PromptTemplate


@pytest.fixture
def talker() -> Talker:
    model = get_reft_model(tiny_model(), ReftConfig(r=2, init_weights=False, positions="all", task_type="CAUSAL_LM"))
    tokenizer = tiny_tokenizer()
    for parameter in model.parameters():  # an edit large enough to change a random model's answer
        if parameter.requires_grad:
            parameter.data.mul_(3)
    return Talker(model.eval(), tokenizer, PromptTemplate(tokenizer))


def test_a_batch_answers_as_each_prompt_alone(talker: Talker) -> None:
    prompts = ["a", "a longer prompt", "😀"]
    together = answer(talker, prompts, max_new_tokens=6)
    assert together == [answer(talker, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_the_base_answers_without_the_adapter(talker: Talker) -> None:
    base = Talker(tiny_model(), talker.tokenizer, talker.template)
    prompts = ["hello", "what"]
    assert reply(talker, prompts, adapter=False, max_new_tokens=6) == reply(base, prompts, max_new_tokens=6)
    assert reply(talker, prompts, max_new_tokens=6) != reply(base, prompts, max_new_tokens=6)


def test_an_answer_says_whether_it_ended(talker: Talker) -> None:
    assert not answer(talker, ["a"], max_new_tokens=1)[0].ended
    first = answer(talker, ["a"], max_new_tokens=1, eos_token_id=None)
    with torch.no_grad():  # make the end of the turn the most likely token
        talker.model.get_base_model().lm_head.weight.zero_()
        ended = answer(talker, ["a"], max_new_tokens=4, suppress_tokens=[0, 1, *range(3, 260)])
    assert ended[0].ended
    assert ended[0].text == ""
    assert not first[0].ended


def test_a_prompt_of_no_tokens_is_said(talker: Talker) -> None:
    plain = PromptTemplate(talker.tokenizer, "plain")
    with pytest.raises(ValueError, match="The prompt is empty"):
        reply(Talker(talker.model, talker.tokenizer, plain), ["a", ""])


def test_a_stream_is_the_reply(talker: Talker) -> None:
    pieces: list[str] = []
    said = stream(talker, "hello", write=pieces.append, max_new_tokens=8)
    assert said == "".join(pieces).strip() == reply(talker, ["hello"], max_new_tokens=8)[0]


def test_a_chat_remembers_its_turns_and_forgets_the_base(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, str]]] = []

    def said(_: Talker, messages: list[dict[str, str]], *, adapter: bool = True, **__: object) -> str:
        asked.append([*messages, {"role": "adapter", "content": str(adapter)}])
        return "yes"

    monkeypatch.setattr("reftune.cli.talk.stream", said)
    lines = iter(["one", "/base", "two", "/base three", "/reset", "four", "/quit"])
    chat(talker, read=lambda: next(lines), write=lambda _: None)
    contents = [[turn["content"] for turn in turns] for turns in asked]
    assert contents == [
        ["one", "True"],
        ["one", "False"],
        ["one", "yes", "two", "True"],
        ["one", "yes", "two", "yes", "three", "False"],
        ["four", "True"],
    ]


def test_a_chat_ends_with_its_input(talker: Talker) -> None:
    def end() -> str:
        raise EOFError

    chat(talker, read=end, write=lambda _: None)


def test_there_is_nothing_to_compare_without_an_adapter(talker: Talker) -> None:
    base = Talker(tiny_model(), talker.tokenizer, talker.template)
    written: list[str] = []
    lines = iter(["/base hi", "/quit"])
    chat(base, read=lambda: next(lines), write=written.append)
    assert "no adapter to turn off" in "".join(written)


def test_an_adapter_is_asked_with_the_template_it_was_trained_with(tmp_path: Path) -> None:
    from reftune.models import load_model

    base, _ = load_model(str(save_tiny(tmp_path / "base")))
    model = get_reft_model(base, ReftConfig(r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "out"))
    assert open_model(str(tmp_path / "out")).template.is_chat
    (tmp_path / "out" / "recipe.yaml").write_text("data: {system: Be brief.}")
    assert open_model(str(tmp_path / "out")).template.system == "Be brief."
    (tmp_path / "out" / "recipe.yaml").write_text("data: {template: plain}")
    opened = open_model(str(tmp_path / "out"), str(tmp_path / "base"))
    assert not opened.template.is_chat
    assert opened.has_adapter


def test_a_saved_composition_opens_as_an_adapter_does(tmp_path: Path) -> None:
    base = str(save_tiny(tmp_path / "base"))
    model, _ = reftune.load_model(base)
    model = reftune.get_reft_model(model, reftune.ReftConfig(r=2, init_weights=False, task_type="CAUSAL_LM"), "style")
    model.add_adapter("tone", reftune.ReftConfig(r=1, positions="all", init_weights=False, task_type="CAUSAL_LM"))
    reftune.save_composition(model, reftune.compose({"style": 0.5, "tone": 2.0}), tmp_path / "both")
    for given in (None, base):
        opened = open_model(str(tmp_path / "both"), given)
        assert reftune.current(opened.model) == reftune.compose({"style": 0.5, "tone": 2.0})
        assert len(answer(opened, ["hi"], max_new_tokens=3)) == 1
