"""How two adapters' subspaces lie to each other at the sites they share, from their weights alone.

An edit is h + Uᵀ(V h + c): it *writes* into the span of U's rows and *reads* the span of V's (W − R for LoReFT). The
principal angles between two spans are 90° where neither has anything of the other and 0° where they share a direction.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..interventions.forms import Form, NoFormError, form_of
from ..positions.overlap import TokenSet
from ..tuner import ReftLayer, ReftModel


@dataclass(frozen=True)
class SharedSite:
    """One place that two adapters, a and b, both edit. Angles are in degrees, ascending.

    writes: between what a and b write.
    a_reads_b, b_reads_a: between what one reads and the other writes.
    a_disturbed, b_disturbed: predicted interference when the other's edit comes first: the root mean square, over
        h ~ N(0, I), of how much the edit changes because the other has written, relative to the edit alone:
        ‖M_a [M_b m_b]‖ / ‖[M_a m_a]‖ in Frobenius norms, M = UᵀV, m = Uᵀc. 0 where a reads nothing of b's, NaN
        where an edit has an act_fn or is not of this form.
    overlap: how much of the smaller written span lies in the other, 0 to 1 (root mean square of the cosines).
    same_tokens: False where their tokens are never the same, so that they meet through attention only.
    """

    site: str
    layer: int | None
    tokens: tuple[str, str]
    same_tokens: bool
    writes: tuple[float, ...]
    a_reads_b: tuple[float, ...]
    b_reads_a: tuple[float, ...]
    a_disturbed: float
    b_disturbed: float
    overlap: float


def shared_sites(tuner: ReftModel, a: str, b: str) -> Iterator[SharedSite]:
    """The sites that both adapters edit, one entry for each pair of their token groups."""
    for path, layer in tuner.model.named_modules():
        if not isinstance(layer, ReftLayer) or a not in layer.groups or b not in layer.groups:
            continue
        for one in _edits(layer, a):
            for other in _edits(layer, b):
                yield _compare(path, one, other)


@dataclass(frozen=True)
class _Edit:
    """One intervention: its tokens, orthonormal rows of what it writes and reads (None: everything), its form."""

    tokens: TokenSet
    writes: Tensor | None
    reads: Tensor | None
    form: Form | None


def _edits(layer: ReftLayer, adapter: str) -> list[_Edit]:
    found = []
    for (positions, group), intervention in zip(layer.groups[adapter], layer.interventions(adapter), strict=True):
        tokens = TokenSet.of(group, positions)
        try:
            form = form_of(intervention)
        except NoFormError:  # an act_fn inside, say: the directions are known all the same
            both = intervention.directions()
            if both is None:
                found.append(_Edit(tokens, None, None, None))
            else:
                found.append(
                    _Edit(tokens, span(both[0].detach().cpu().double()), span(both[1].detach().cpu().double()), None)
                )
            continue
        if form.diagonal is not None:
            found.append(_Edit(tokens, None, None, form))
        else:
            found.append(_Edit(tokens, span(form.up), span(form.down), form))
    return found


def _compare(path: str, a: _Edit, b: _Edit) -> SharedSite:
    parts = path.split(".")
    number = next((int(part) for part in reversed(parts) if part.isdigit()), None)
    overlap = float("nan")
    if a.writes is not None and b.writes is not None:
        fewer = max(1, min(len(a.writes), len(b.writes)))
        overlap = float(((a.writes @ b.writes.mT).square().sum() / fewer).sqrt())
    return SharedSite(
        site=path.replace(".edit_", "."),
        layer=number,
        tokens=(str(a.tokens), str(b.tokens)),
        same_tokens=not a.tokens.disjoint(b.tokens),
        writes=angles(a.writes, b.writes),
        a_reads_b=angles(a.reads, b.writes),
        b_reads_a=angles(b.reads, a.writes),
        a_disturbed=disturbed(a.form, b.form),
        b_disturbed=disturbed(b.form, a.form),
        overlap=overlap,
    )


def span(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span, (k, d) with k the rank of `rows` (r, d)."""
    if not bool(rows.any()):
        return rows[:0]
    _, size, right = torch.linalg.svd(rows, full_matrices=False)
    return right[size > 1e-6 * size[0]]


def angles(a: Tensor | None, b: Tensor | None) -> tuple[float, ...]:
    """Principal angles in degrees between two spans with orthonormal rows, ascending; () if one is empty or None."""
    if a is None or b is None or not len(a) or not len(b):
        return ()
    few, many = (a, b) if len(a) <= len(b) else (b, a)
    cosine = torch.linalg.svdvals(few @ many.mT).clamp(max=1.0)
    sine = torch.linalg.svdvals(few - (few @ many.mT) @ many).flip(0).clamp(max=1.0)  # precise where the cosine is not
    degrees = torch.where(cosine > 0.7, sine.asin(), cosine.acos()).rad2deg()
    return tuple(sorted(degrees.tolist()))


def disturbed(reader: Form | None, writer: Form | None) -> float:
    """‖M_r [M_w m_w]‖ / ‖[M_r m_r]‖: how much the reader's edit changes because the writer wrote first."""
    if reader is None or writer is None:
        return float("nan")
    if any(form.act_fn is not None or form.diagonal is not None for form in (reader, writer)):
        return float("nan")  # no one low-rank matrix says it
    written = torch.cat([writer.down, writer.offset.unsqueeze(1)], dim=1)
    cross = reader.down @ writer.up.mT  # (r_reader, r_writer): what is read of what is written
    change = _norm(reader.up, cross @ written)
    alone = _norm(reader.up, torch.cat([reader.down, reader.offset.unsqueeze(1)], dim=1))
    return change / alone if alone > 0 else 0.0


def _norm(up: Tensor, rows: Tensor) -> float:
    """‖upᵀ rows‖ in the Frobenius norm, without the d×d matrix."""
    squared = ((up @ up.mT) * (rows @ rows.mT)).sum()
    return float(squared.clamp(min=0).sqrt())
