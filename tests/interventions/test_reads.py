"""Where an edit should read: the sketch finds what the whole matrix says, centred, in the scale of a random start."""

import pytest
import torch
from torch import Tensor

from reftune.interventions.reads import Reads


def tokens(count: int = 400, width: int = 48, rank: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows W, states with a large mean and uneven spread, and gradients that depend on three directions."""
    h = torch.randn(count, width) * torch.linspace(5, 0.1, width) + 30 * torch.randn(width)
    map_ = torch.randn(width, 3) @ torch.diag(torch.tensor([9.0, 4.0, 1.0])) @ torch.randn(3, width)
    g = 1e-3 * (h @ map_.mT) + 1e-3 * torch.randn(count, width) + 0.5
    return torch.randn(rank, width) / width**0.5, h, g


def passes(reads: Reads, h: Tensor, g: Tensor, size: int) -> Reads:
    for part in zip(h.split(size), g.split(size), strict=True):
        reads.add(*part)
    reads.turn()
    for part in zip(h.split(size), g.split(size), strict=True):
        reads.add(*part)
    return reads


@pytest.mark.parametrize(("width", "rank"), [(48, 2), (200, 2), (200, 4), (12, 3)])
def test_the_rows_are_the_main_directions_of_the_gradient(width: int, rank: int) -> None:
    w, h, g = tokens(width=width, rank=min(rank, 3))
    new, mean = passes(Reads(w), h, g, 64).start()
    whole = g.double().mT @ (h.double() - h.double().mean(0))
    _, _, right = torch.linalg.svd(whole)
    along = torch.nn.functional.normalize(new.double()) @ right[: len(new)].mT
    torch.testing.assert_close(along.abs(), torch.eye(len(new), dtype=torch.float64), atol=5e-3, rtol=0)
    torch.testing.assert_close(mean, h.mean(0))


def test_what_is_read_is_centred_and_as_large_as_at_random() -> None:
    w, h, g = tokens()
    new, mean = passes(Reads(w), h, g, 50).start()
    read = (h - mean) @ new.mT
    size = (h @ w.mT).square().mean().sqrt()
    assert bool((read.mean(0).abs() < 1e-4 * size).all())
    torch.testing.assert_close(read.square().mean(0).sqrt(), size.expand(len(w)), rtol=1e-3, atol=0)
    assert not torch.allclose((h @ new.mT).square().mean().sqrt(), size, rtol=0.5)  # the mean had been most of it


def test_batches_of_any_size_give_the_same() -> None:
    w, h, g = tokens()
    one, mean = passes(Reads(w), h, g, 400).start()
    other, again = passes(Reads(w), h, g, 33).start()
    sign = torch.sign((one * other).sum(1, keepdim=True))
    torch.testing.assert_close(one, sign * other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mean, again)


def test_a_site_whose_states_do_not_move_keeps_its_random_rows() -> None:
    w, h, g = tokens()
    same = h[:1].expand(400, -1)
    new, mean = passes(Reads(w), same, g, 100).start()
    torch.testing.assert_close(new, w, rtol=0, atol=0)
    torch.testing.assert_close(mean, h[0])


def test_without_a_gradient_or_without_tokens_the_rows_stay() -> None:
    w, h, g = tokens()
    new, _ = passes(Reads(w), h, torch.zeros_like(g), 100).start()
    torch.testing.assert_close(new, w, rtol=0, atol=0)
    empty = Reads(w)
    empty.turn()
    new, mean = empty.start()
    torch.testing.assert_close(new, w, rtol=0, atol=0)
    assert not bool(mean.any())


def test_fewer_directions_than_rows() -> None:
    w, h, g = tokens(rank=3)
    flat = h.mean(0) + torch.outer(torch.randn(400), torch.randn(48))  # moves in one direction alone
    new, _ = passes(Reads(w), flat, g, 100).start()
    assert bool(torch.isfinite(new).all())
    assert not torch.allclose(new[0], w[0])
    torch.testing.assert_close(new[1:], w[1:], rtol=0, atol=0)
