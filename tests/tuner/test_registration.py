"""PEFT's enum takes our method on every Python: since 3.12 a member is an attribute of its class."""

import copy
import pickle

from peft.utils import PeftType

from reftune import ReftConfig
from reftune.tuner import registration


def test_the_member_is_an_attribute_and_a_value_and_one_of_the_list() -> None:
    member = registration.PEFT_TYPE
    assert vars(PeftType)["REFT"] is member
    assert PeftType.REFT is PeftType["REFT"] is PeftType("REFT") is member
    assert member in list(PeftType)
    assert (member.name, member.value, str(member.value)) == ("REFT", "REFT", "REFT")
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member


def test_adding_it_again_changes_nothing() -> None:
    before = list(PeftType)
    assert registration._add_peft_type() is registration.PEFT_TYPE
    assert list(PeftType) == before
    assert ReftConfig().peft_type is registration.PEFT_TYPE
