"""A bank of interventions ≡ each of them alone."""

import pytest
import torch

from reftune.interventions import INTERVENTIONS, LoreftIntervention, ReftR1Intervention
from reftune.interventions.bank import Bank, bank_key

KINDS = ["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft", "red", "postblock"]
D = 12


def make(kind: str, rank: int, **settings):
    module = INTERVENTIONS[kind](
        embed_dim=D, low_rank_dimension=rank, init_weights=False, dtype=torch.float64, **settings
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2)])
@torch.no_grad()
def test_a_bank_edits_as_each_alone_whatever_the_ranks(kind: str, ranks: tuple[int, ...]) -> None:
    modules = [make(kind, rank) for rank in ranks]
    h = torch.randn(3, 5, D, dtype=torch.float64)
    expected = torch.stack([module(rows) for module, rows in zip(modules, h, strict=True)])
    torch.testing.assert_close(Bank.of(modules)(h), expected)


@torch.no_grad()
def test_kinds_of_one_form_share_a_bank_and_narrow_states_are_computed_in_fp32() -> None:
    modules = [
        m.float() for m in (make("loreft", 2), make("nodireft", 3), make("lobireft", 1), make("noreft", 2, bias="none"))
    ]
    h = torch.randn(4, 3, D).bfloat16()
    expected = torch.stack([module(rows) for module, rows in zip(modules, h, strict=True)])
    found = Bank.of(modules)(h)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_what_has_no_common_form_has_no_bank() -> None:
    assert bank_key(LoreftIntervention(D, 2, act_fn="gelu", init_weights=False)) is None
    assert bank_key(ReftR1Intervention(D)) is None
    assert bank_key(type("Mine", (LoreftIntervention,), {})(D, 2)) is None
    assert Bank.of([make("direft", 2), make("direft", 2, act_fn="gelu")]) is None
    assert Bank.of([make("red", 1), make("loreft", 2)]) is None


@torch.no_grad()
def test_a_bank_knows_when_a_weight_was_written_to() -> None:
    modules = [make("direft", 2), make("direft", 2)]
    bank = Bank.of(modules)
    assert bank.is_current()
    bank(torch.randn(2, 1, D, dtype=torch.float64))
    assert bank.is_current()
    modules[1].W.add_(1)
    assert not bank.is_current()
