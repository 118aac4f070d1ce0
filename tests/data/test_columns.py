"""Which columns are found, and what is said when none are."""

import pytest

from reftune.data import Example, find_columns

USER = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": USER, "completion": [{"role": "assistant", "content": "4"}]},
        {"prompt": USER, "completion": "4"},
        {"messages": [*USER, {"role": "assistant", "content": "4"}], "id": 3},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"instruction": "2+2?", "output": "4"},
        {"instruction": "2+2?", "input": None, "output": "4"},
    ],
)
def test_every_layout_gives_the_same_example(row: dict) -> None:
    assert find_columns(row)(row) == Example(USER, "4")


def test_alpaca_input_follows_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert find_columns(row)(row).messages[0]["content"] == "Add.\n2 2"


def test_only_the_last_turn_of_a_chat_is_learned() -> None:
    turns = [*USER, {"role": "assistant", "content": "4"}, *USER, {"role": "assistant", "content": "four"}]
    assert find_columns(["messages"])({"messages": turns}) == Example(turns[:3], "four")


def test_columns_of_other_rows_are_no_loss() -> None:
    """`datasets` gives every message the keys of all."""
    turns = [{**turn, "tool_calls": None, "thinking": ""} for turn in [*USER, {"role": "assistant", "content": "4"}]]
    assert find_columns(["messages"])({"messages": turns}).response == "4"


def test_columns_can_be_renamed() -> None:
    row = {"question": "2+2?", "answer": "4", "prompt": "not this"}
    assert find_columns(row, {"prompt": "question", "completion": "answer"})(row) == Example(USER, "4")


def test_a_bad_value_is_told_by_the_datas_own_name_of_its_column() -> None:
    row = {"question": "2+2?", "answer": 4}
    with pytest.raises(ValueError, match="column answer must hold text"):
        find_columns(row, {"prompt": "question", "completion": "answer"})(row)


def test_unknown_columns_are_named_beside_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match=r"columns question, answer.*messages; prompt \+ completion; instruction"):
        find_columns(["question", "answer"])


@pytest.mark.parametrize(
    ("names", "rename", "says"),
    [
        (["q", "a"], {"prompt": "question"}, "'question', but the data has q, a"),
        (["q", "a"], {"promt": "q"}, "not to 'promt'"),
    ],
)
def test_a_wrong_rename_is_an_error(names: list[str], rename: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_columns(names, rename)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": USER}, "last of the messages must be the assistant's"),
        ({"messages": []}, "column messages .* but found list"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, "a prompt is needed"),
        ({"messages": "hello"}, "column messages must hold messages"),
        ({"messages": [{"role": "user", "text": "x"}]}, "a role and a content"),
        (
            {"messages": [*USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]},
            "has tool_calls beside its content, which would be lost",
        ),
        ({"prompt": None, "completion": "4"}, "column prompt must hold text or messages .*, but is empty"),
        (
            {"prompt": "2+2?", "completion": None},
            "column completion must hold text .*, but is empty.*leave the row out",
        ),
        ({"prompt": "2+2?", "completion": 4}, "column completion must hold text .*, but found int 4"),
        ({"prompt": [], "completion": "4"}, "column prompt .* but found list"),
        ({"instruction": "2+2?", "output": None}, "column output must hold text, but is empty"),
        ({"instruction": 3, "output": "4"}, "instruction must hold text"),
    ],
)
def test_a_bad_row_is_an_error(row: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_columns(row)(row)
