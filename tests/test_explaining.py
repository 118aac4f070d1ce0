"""What `explain` shows is what the model edits."""

import pytest
import torch
from tests.tiny_chat import tiny_model, tiny_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from reftune import ReftConfig, compose, explain, get_reft_model
from reftune.explaining import CONTINUES


def adapted(**settings):
    return get_reft_model(tiny_model(), ReftConfig(r=2, init_weights=False, **settings)).eval()


def really_edited(model, ids: torch.Tensor) -> list[int]:
    """Columns of the last block's output that the adapter changes; nothing comes after it that could spread."""
    states = []
    hook = model.get_base_model().model.layers[-1].register_forward_hook(lambda m, a, out: states.append(out))
    with torch.no_grad():
        model(ids)
        with model.disable_adapter():
            model(ids)
    hook.remove()
    edited, plain = states
    return torch.nonzero((edited != plain).any(-1)[0]).flatten().tolist()


@pytest.mark.parametrize("positions", ["f2+l2", "mid1", "prompt", "all", "l3", "gen"])
@pytest.mark.parametrize("text", ["h", "hello", "aaaa"])
def test_the_columns_shown_are_the_columns_edited(positions: str, text: str) -> None:
    model, tokenizer = adapted(layers=[-1], positions=positions), tiny_tokenizer()
    found = explain(model, tokenizer, text, chat_template=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert [column for column in range(ids.shape[1]) if found.at(column)] == really_edited(model, ids)
    assert "".join(found.tokens) == text


def test_all_adapters_that_act_are_shown() -> None:
    model, tokenizer = adapted(layers=[-1], positions="f1"), tiny_tokenizer()
    model.add_adapter("other", ReftConfig(r=2, init_weights=False, layers=[-1], positions="l1"))
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    for use, wanted in (
        (lambda: model.set_adapter(["default", "other"]), [0, 4]),
        (lambda: compose({"other": 1.0}).apply(model), [4]),
        (lambda: compose({"default": 0.5, "other": 1.0}).apply(model), [0, 4]),
    ):
        use()
        found = explain(model, tokenizer, "hello", chat_template=False)
        assert [column for column in range(5) if found.at(column)] == really_edited(model, ids) == wanted
    alone = explain(model, tokenizer, "hello", adapter_name="other", chat_template=False)
    assert [column for column in range(5) if alone.at(column)] == [4]


def test_it_reads_as_a_table_with_the_layers() -> None:
    found = explain(adapted(layers="all", positions="f1+l1"), tiny_tokenizer(), "abc", chat_template=False)
    assert str(found).splitlines() == [
        "*    0  prompt  a  f1 · layers 0-1",
        "     1  prompt  b",
        "*    2  prompt  c  l1 · layers 0-1",
    ]
    other = explain(adapted(component="mlp_output", positions="l1"), tiny_tokenizer(), "ab", chat_template=False)
    assert other.where(1) == "l1 · layer 1 mlp.output"


def test_the_chat_template_is_part_of_the_prompt_and_an_answer_is_not() -> None:
    model, tokenizer = adapted(positions="l1+gen"), tiny_tokenizer()
    found = explain(model, tokenizer, "hi", answer="ho")
    assert found.tokens[: found.prompt][-1] == "⏎"
    assert [found.where(c) for c in range(found.prompt - 1, found.prompt + 2)] == [
        "l1 · layer 1",
        "gen · layer 1",
        "gen · layer 1",
    ]
    assert not found.at(0)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert explain(model, tokenizer, turns).prompt > found.prompt


def test_a_batch_is_explained_row_by_row() -> None:
    model, tokenizer = adapted(positions="l1"), tiny_tokenizer()
    one, two = explain(model, tokenizer, ["a", "bcd"], chat_template=False)
    assert (one.prompt, two.prompt) == (1, 3)
    assert two == explain(model, tokenizer, "bcd", chat_template=False)


def test_tokens_that_share_a_character_are_shown_as_one() -> None:
    found = explain(adapted(positions="l1"), tiny_tokenizer(), "a🤖b", chat_template=False)
    assert found.tokens == ("a", "🤖", CONTINUES, CONTINUES, CONTINUES, "b")


def test_where_adapters_are_disabled_nothing_is_edited() -> None:
    model, tokenizer = get_reft_model(tiny_model(), ReftConfig(positions="all", layers="all")), tiny_tokenizer(False)
    with model.disable_adapter():
        assert "*" not in str(explain(model, tokenizer, "abc"))
        assert "*" in str(explain(model, tokenizer, "abc", adapter_name="default"))  # asked by name: what it would do
    assert "*" in str(explain(model, tokenizer, "abc"))


def test_an_encoder_reads_the_prompt_and_its_decoder_the_answer() -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=300, decoder_start_token_id=0)
    entries = [{"layer": 1}, {"component": "decoder.block.0.output"}]
    model = get_reft_model(
        T5ForConditionalGeneration(config),
        ReftConfig(r=2, positions="all", representations=entries, task_type="SEQ_2_SEQ_LM"),
    )
    found = explain(model, tiny_tokenizer(False), "abc", answer="de")
    assert [found.where(column) for column in range(5)] == ["all · layer 1"] * 3 + ["all · layer 0"] * 2


def test_errors() -> None:
    model, tokenizer = adapted(), tiny_tokenizer()
    with pytest.raises(ValueError, match="no tokens"):
        explain(model, tokenizer, "", chat_template=False)
    with pytest.raises(ValueError, match=r"no adapter 'x'; this model has \['default'\]"):
        explain(model, tokenizer, "a", adapter_name="x")
    tokenizer.chat_template = "{{ raise_exception('Not this.') }}"
    with pytest.raises(ValueError, match=r"chat template refuses .*\(user\): Not this\."):
        explain(model, tokenizer, "a")
