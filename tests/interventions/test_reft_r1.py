"""ReFT-r1: the top-k mean over each prompt's edited tokens, against a loop over prompts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reftune.interventions import ReftR1Intervention


def by_hand(module: ReftR1Intervention, h: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    w = module.R.detach()[0]
    out = h.clone()
    for number in set(segments.tolist()):
        rows = [i for i, s in enumerate(segments.tolist()) if s == number]
        latent = sorted((max(float(h[i] @ w), 0.0) for i in rows), reverse=True)[: module.topk]
        for i in rows:
            out[i] += sum(latent) / len(latent) * w
    return out


@settings(max_examples=80, deadline=None, derandomize=True)
@given(segments=st.lists(st.integers(-3, 6), max_size=20), topk=st.integers(1, 9), seed=st.integers(0, 99))
def test_grouping_equals_a_loop_over_prompts(segments: list[int], topk: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = ReftR1Intervention(8, topk=topk).eval()
    h, numbers = torch.randn(len(segments), 8), torch.tensor(segments, dtype=torch.long)
    torch.testing.assert_close(module(h, numbers).detach(), by_hand(module, h, numbers), atol=1e-5, rtol=1e-5)


def test_a_tie_counts_k_tokens_once() -> None:
    module = ReftR1Intervention(8, topk=2).eval()
    h = torch.ones(5, 8)
    numbers = torch.tensor([0, 0, 0, 1, 1])
    torch.testing.assert_close(module(h, numbers).detach(), by_hand(module, h, numbers))


def test_a_batch_of_prompts_without_numbers_is_one_prompt_a_row() -> None:
    module = ReftR1Intervention(8, topk=2).eval()
    h = torch.randn(3, 5, 8)
    numbers = torch.arange(3).repeat_interleave(5)
    torch.testing.assert_close(module(h).view(-1, 8), module(h.view(-1, 8), numbers))


def test_only_the_k_strongest_tokens_get_a_gradient() -> None:
    module = ReftR1Intervention(8, topk=2)
    w = module.R.detach()[0]
    h = (torch.tensor([3.0, 1.0, 2.0, -1.0]).unsqueeze(1) * w).requires_grad_()
    (module(h, torch.zeros(4, dtype=torch.long)) @ w).sum().backward()
    through_edit = (h.grad - w) @ w  # what is left beside the residual's own
    torch.testing.assert_close(through_edit, torch.tensor([2.0, 0.0, 2.0, 0.0]), atol=1e-5, rtol=0)


def test_it_learns_from_its_random_start() -> None:
    module = ReftR1Intervention(8)
    module(torch.randn(20, 8)).pow(2).sum().backward()
    assert module.R.grad.abs().max() > 0
