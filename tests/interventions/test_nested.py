"""Nested ranks: the first k rows are an adapter of rank k, and training with a random k makes it a good one."""

import pytest
import torch
from torch import Tensor

from reftune.interventions import INTERVENTIONS, Choice, Intervention, LoreftIntervention, orthonormality_error
from reftune.interventions.retraction import retract_all

KINDS = ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"]


class Fixed(Choice):
    """A pass whose rank is not drawn."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def rank(self, ranks: object) -> int:
        return self.k


def cut(module: Intervention, k: int) -> Intervention:
    small = INTERVENTIONS[module.kind](module.embed_dim, k, init_weights=False)
    small.load_state_dict({key: value[:k] for key, value in module.state_dict().items()})
    return small.to(next(module.parameters()).dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_of_rank_k_is_the_first_k_rows_alone(kind: str) -> None:
    module = INTERVENTIONS[kind](20, 4, init_weights=False, nested=True).double().train()
    h = torch.randn(6, 20, dtype=torch.float64)
    for k in range(1, 5):
        small = cut(module, k).train()
        module.zero_grad()
        out = module(h, choice=Fixed(k))
        torch.testing.assert_close(out, small(h), atol=1e-7, rtol=1e-7)
        out.pow(2).sum().backward()
        small(h).pow(2).sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad[:k], small.get_parameter(name).grad, atol=1e-6, rtol=1e-6)
            assert not parameter.grad[k:].any(), name


def test_inference_uses_all_rows() -> None:
    module = LoreftIntervention(20, 4, init_weights=False, nested=True)
    plain = LoreftIntervention(20, 4)
    plain.load_state_dict(module.state_dict())
    h = torch.randn(3, 20)
    assert torch.equal(module.eval()(h), plain.eval()(h))
    with torch.no_grad():
        assert torch.equal(module.train()(h), plain.train()(h))


def test_all_sites_of_a_pass_draw_the_same_rank_and_each_pass_anew() -> None:
    choices = [Choice() for _ in range(40)]
    drawn = [[choice.rank((1, 2, 3, 4)) for _ in range(3)] for choice in choices]
    assert all(len(set(ranks)) == 1 for ranks in drawn)
    assert {ranks[0] for ranks in drawn} == {1, 2, 3, 4}
    torch.manual_seed(5)
    first = [Choice().rank((1, 2, 3, 4)) for _ in range(10)]
    torch.manual_seed(5)
    assert [Choice().rank((1, 2, 3, 4)) for _ in range(10)] == first


def test_rows_are_orthonormal_after_hard_training() -> None:
    module = LoreftIntervention(20, 4, nested=[1, 2, 4]).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.1)
    for _ in range(30):
        retract_all([module])
        optimizer.zero_grad()
        (module(torch.randn(9, 20)) - 1).pow(2).mean().backward()
        optimizer.step()
    with torch.no_grad():
        module.eval()(torch.randn(2, 20))
    assert orthonormality_error(module.R) < 1e-5


def fitted(nested: object, rank: int, scales: Tensor, steps: int = 250) -> Intervention:
    """LoReFT fitted to h ↦ h + Σ scalesᵢ vᵢ, whose best edit of rank k is in the first k of the v."""
    torch.manual_seed(2)
    module = LoreftIntervention(len(scales) * 2, rank, nested=nested).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    for _ in range(steps):
        h = torch.randn(64, module.embed_dim)
        wanted = h.clone()
        wanted[:, : len(scales)] += scales * h[:, len(scales) :]
        retract_all([module])
        optimizer.zero_grad()
        (module(h) - wanted).pow(2).mean().backward()
        optimizer.step()
    return module.eval()


def test_trained_nested_the_first_rows_are_the_best_of_their_rank() -> None:
    """Against the optimum, which is known here: the k largest directions. A plain adapter cut to k is far worse."""
    scales = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.25, 0.1])
    nested, plain = fitted(True, 4, scales), fitted(False, 4, scales)
    h = torch.randn(4000, 12)
    wanted = h.clone()
    wanted[:, :6] += scales * h[:, 6:]
    worse = []
    with torch.no_grad():
        for k in (1, 2, 3):
            errors = {
                name: float((cut(m, k)(h) - wanted).pow(2).sum(1).mean()) for name, m in (("n", nested), ("p", plain))
            }
            best = float(scales[k:].square().sum())
            assert errors["n"] < 1.25 * best + 0.1, k
            worse.append(errors["p"] / errors["n"])
        whole = [float((m(h) - wanted).pow(2).sum(1).mean()) for m in (nested, plain)]
    assert max(worse) > 2
    assert whole[0] < whole[1] + 0.1  # and nothing is lost at the full rank


@pytest.mark.parametrize(
    ("kind", "nested", "message"),
    [
        ("loreft", [5], r"nested must be True or a list of ranks between 1 and r=4, such as \[1, 4\], but is \[5\]"),
        ("loreft", [0, 2], r"but is \[0, 2\]"),
        ("loreft", "all", "but is 'all'"),
        ("loreft", 2, "but is 2"),
        ("reft_r1", True, "ReftR1Intervention has no rank, so nested=True has no meaning"),
        ("red", True, "RedIntervention has no setting 'nested'"),
    ],
)
def test_what_cannot_be_meant(kind: str, nested: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        INTERVENTIONS[kind](12, 4, nested=nested)


def test_the_config_names_the_ranks() -> None:
    assert LoreftIntervention(12, 4, nested=True).config()["nested"] is True
    assert LoreftIntervention(12, 4, nested=[4, 1]).config()["nested"] == [1, 4]
    assert LoreftIntervention(12, 4).config()["nested"] is False
