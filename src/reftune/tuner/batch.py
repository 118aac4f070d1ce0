"""What one forward pass edits: its inputs → the layout of its tokens → row indices, found once and kept for the layers.

The prompt of a row is, in this order: what `prompt_mask` marks, what precedes the first label ≠ −100, the columns that
`generate` was given, the columns that a known cache was filled with at first, or else everything.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..interventions.choice import Choice
from ..positions import Layout, NoPromptError, check_prompts, generated, layout, packed_starts, parse, select_group
from .mix import Mix


@dataclass
class Prompt:
    """A prompt being generated from: its number of columns, and its mask (B, columns) if there is one."""

    columns: int
    mask: Tensor | None = None
    end: Tensor | None = None  # columns again, for compiled graphs, which a number would be a part of
    read: bool = False  # a forward pass has gone past its last column
    seen: int = 0  # columns computed so far; recurrent caches do not say
    cache: Any = None  # the cache it was read into, while `generate` runs; afterwards the cache has the prompt
    guided: bool = False  # a negative prompt runs beside it

    def is_beside(self, cache: Any) -> bool:
        """Whether a pass with this cache, or None, is the negative prompt's: it comes when the prompt has been read."""
        return self.guided and self.read and cache is not self.cache


@dataclass
class Inputs:
    """The arguments of a forward pass that say where its tokens stand."""

    shape: tuple[int, int] | None  # (rows, columns) of this pass; None if the inputs have no token axis
    mask: Tensor | None = None  # (B, past + columns)
    labels: Tensor | None = None  # (B, columns), of a causal language model
    prompt_mask: Tensor | None = None  # (B, columns)
    position_ids: Tensor | None = None  # (B, columns)
    past: int | Tensor = 0  # columns in the cache; a tensor () in a compiled step after the prompt
    device: torch.device | None = None
    hears: Any = None  # the model, if it is one that makes a mask of frames of a mask of audio samples
    keep: int = 0  # the last columns that logits are asked for, 0 for all: some models' later blocks get these alone

    def all_prompt(self) -> bool:
        """Whether every token of this pass is prompt, whatever said so."""
        if self.labels is not None or self.prompt_mask is None:
            return self.labels is None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False  # a training step, which nothing is decoded from, and need not wait for the mask
        real = self.mask if self.mask is not None and self.mask.shape == self.prompt_mask.shape else None
        return bool(((self.prompt_mask != 0) | (False if real is None else real == 0)).all())

    def layout(self, prompt: Prompt | None) -> Layout:
        """The layout of this pass's columns; `prompt` is given when it continues or makes up a generation."""
        assert self.shape is not None
        rows, columns = self.shape
        if isinstance(self.past, Tensor):
            assert prompt is not None
            assert prompt.end is not None
            return generated(rows, self.past - prompt.end + torch.arange(columns, device=self.past.device))
        total = self.past + columns
        width = max(total, prompt.columns) if prompt else total
        real = _widen(self.mask, rows, total, self.device)
        if width > total:  # a prompt read in pieces: what follows is known from generate's own mask
            rest = torch.ones(rows, width - total, dtype=torch.bool, device=real.device)
            if prompt and prompt.mask is not None and prompt.mask.shape == (rows, width):
                rest = prompt.mask[:, total:].to(real.device) != 0
            real = torch.cat([real, rest], dim=1)

        response = starts = None
        if prompt is not None:
            response = (torch.arange(width, device=real.device) >= prompt.columns).expand(rows, width)
        elif self.prompt_mask is not None or self.labels is not None:
            answers = self.prompt_mask == 0 if self.prompt_mask is not None else self.labels != -100
            answers = answers.to(real.device)  # type: ignore[union-attr]
            response = torch.cat([answers.new_zeros(rows, self.past), answers], dim=1)
        if self.position_ids is not None and self.past == 0 and width == columns:
            ids = self.position_ids.to(real.device).expand(rows, columns)
            starts = packed_starts(ids, real)
        places = layout(real, response, starts)
        if width > total:
            places = Layout(*(t[:, :total] for t in (places.index, places.length, places.generated, places.segment)))
        return places.last(columns)


def _widen(mask: Tensor | None, rows: int, total: int, device: torch.device | None) -> Tensor:
    """A 2-D mask as bool (B, total): missing columns on the left are tokens; no usable mask means no padding."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != rows:
        return torch.ones(rows, total, dtype=torch.bool, device=device)
    real = mask[:, :total] != 0
    if real.shape[1] < total:
        real = torch.cat([real.new_ones(rows, total - real.shape[1]), real], dim=1)
    return real


def _of_frames(model: Any, mask: Tensor, seen: tuple[int, int]) -> Tensor | None:
    """A mask (B, samples) of audio as one of the frames (B, L) that a speech model makes of it, padded on the right as
    there; None for other models, and where the blocks see another number of frames."""
    count = getattr(model, "_get_feat_extract_output_lengths", None)
    if count is None or mask.shape[0] != seen[0]:
        return None
    more = {"add_adapter": False} if "add_adapter" in inspect.signature(count).parameters else {}
    if int(count(torch.tensor([mask.shape[1]], device="cpu"), **more)) != seen[1]:
        return None
    lengths = count((mask != 0).sum(1), **more)
    return torch.arange(seen[1], device=mask.device) < lengths.unsqueeze(1)


_UNKNOWN: Any = object()


@dataclass
class Rows:
    """Tokens to edit: `index` (N,) into the flattened (B·L, d) hidden states, `segments` (N,) their prompts."""

    index: Tensor
    segments: Tensor


@dataclass
class Slots:
    """Tokens of several adapters, sorted by adapter: `index` (N,) as in `Rows`.

    Where the adapters edit unequally many, `pad` (A, n) says which of the N stand where, with whatever in the gaps, and
    `take` (N,) where each of them stands in the flattened (A·n).
    """

    index: Tensor
    pad: Tensor | None = None
    take: Tensor | None = None


@dataclass
class Batch:
    """One forward pass: knows the rows of every (positions, group), and finds each once."""

    inputs: Inputs
    prompt: Prompt | None = None
    adapter_names: list[str] | None = None  # PEFT's mixed batches: one name a row
    mix: Mix | None = None
    choice: Choice | None = None  # of subspaces, for the interventions that have them
    nothing: bool = False  # known beforehand: this pass edits nothing (a decode step after the prompt)
    places: Layout | None = None
    _found: dict[Any, Any] = field(default_factory=dict)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters of the rows, each once."""
        return tuple(name for name in dict.fromkeys(self.adapter_names or ()) if name != "__base__")

    def rows(self, adapter: str, positions: str, group: str, hidden: Tensor, couples: bool = False) -> Rows | None:
        """The rows of `hidden` (B, L, d) that the group edits, on its device; None if there are none."""
        if self.nothing:
            return None
        name = adapter if self.adapter_names else None
        key = (name, positions, group, hidden.device, couples, self._kept(hidden))
        found: Rows | None = self._found.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            found = self._found[key] = self._rows(adapter, positions, group, hidden, couples)
        return found

    def joined(self, parts: list[Rows]) -> tuple[Tensor, list[int]]:
        """The indices of several `rows` one after another, and how many of each; found once for all layers."""
        key = tuple(map(id, parts))
        joined: tuple[Tensor, list[int]] | None = self._found.get(key)
        if joined is None:
            joined = torch.cat([rows.index for rows in parts]), [len(rows.index) for rows in parts]
            self._found[key] = joined
        return joined

    def together(self, turn: tuple[tuple[str, str, str], ...], hidden: Tensor) -> tuple[Tensor, bool] | None:
        """The rows of hidden that the members (adapter, positions, group) of a turn edit, one member's after another's,
        and whether autocast is on; None unless each edits equally many. Found once for all layers."""
        key = (turn, hidden.device, self._kept(hidden))
        found: tuple[Tensor, bool] | None = self._found.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            parts = [self.rows(*member, hidden) for member in turn]
            counts = {0 if rows is None else len(rows.index) for rows in parts}
            found = None
            if len(counts) == 1 and 0 not in counts:
                index = torch.cat([rows.index for rows in parts if rows is not None])
                found = index, torch.is_autocast_enabled(hidden.device.type)
            self._found[key] = found
        return found

    def slots(self, adapters: tuple[str, ...], positions: str, group: str, hidden: Tensor) -> Slots | None:
        """The rows of `hidden` (B, L, d) that each of the adapters edits in its own rows of a mixed batch."""
        key = (adapters, positions, group, hidden.device, self._kept(hidden))
        if key not in self._found:
            self._found[key] = self._slots(adapters, positions, group, hidden)
        found: Slots | None = self._found[key]
        return found

    def edit_masked(self, positions: str, group: str, hidden: Tensor, intervention: Any) -> Tensor:
        """hidden (B, L, d) edited everywhere, taken where the group's tokens are: shapes that `torch.compile` can tell
        beforehand. The rows thrown away cost 2r of some 12d multiplications a token and layer."""
        tokens = self._tokens(positions, group, hidden)
        return hidden if tokens is None else torch.where(tokens.unsqueeze(-1), intervention(hidden), hidden)

    def _tokens(self, positions: str, group: str, hidden: Tensor) -> Tensor | None:
        """The tokens (B, L) that the group edits, whatever the row's adapter; None if it is known to edit none."""
        terms = parse(group)
        if self.prompt is not None and self.prompt.read and all(term.in_prompt for term in terms):
            return None
        key = (positions, group, self._kept(hidden))
        if key not in self._found:
            places, expression = self._layout(hidden), parse(positions)
            if self.inputs.labels is not None or self.inputs.prompt_mask is not None:
                check_prompts(places, expression)
            self._found[key] = select_group(terms, places, expression)
        found: Tensor = self._found[key]
        return found

    def _owners(self, adapters: tuple[str, ...], rows: int, device: torch.device) -> Tensor:
        """For each row the number of its adapter among `adapters`, or −1. Beams repeat rows."""
        names = self.adapter_names or []
        if not names or rows % len(names):
            raise ValueError(
                f"adapter_names names adapters for {len(names)} rows, but the batch has {rows}: name one for each row."
            )
        number = {name: i for i, name in enumerate(adapters)}
        owners = torch.tensor([number.get(name, -1) for name in names], device=device)
        return owners.repeat_interleave(rows // len(names))

    def _rows(self, adapter: str, positions: str, group: str, hidden: Tensor, couples: bool) -> Rows | None:
        tokens = self._tokens(positions, group, hidden)
        if tokens is None:
            return None
        places = self._layout(hidden)
        if self.adapter_names is not None:
            tokens = tokens & (self._owners((adapter,), tokens.shape[0], tokens.device) == 0).unsqueeze(1)
        segments = places.segment
        if couples:
            # a generated token stands alone, so that it is edited alike with and without a cache
            alone = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape) + segments.max() + 1
            segments = torch.where(places.generated >= 0, alone, segments)
            self._whole_prompts(places)
        index = tokens.reshape(-1).nonzero().squeeze(1)
        if index.numel() == 0:
            return None
        return Rows(index.to(hidden.device), segments.reshape(-1)[index].to(hidden.device))

    def _slots(self, adapters: tuple[str, ...], positions: str, group: str, hidden: Tensor) -> Slots | None:
        tokens = self._tokens(positions, group, hidden)
        if tokens is None:
            return None
        owners = self._owners(adapters, tokens.shape[0], tokens.device)
        index = (tokens & (owners >= 0).unsqueeze(1)).reshape(-1).nonzero().squeeze(1)
        if index.numel() == 0:
            return None
        slot, order = owners[index // tokens.shape[1]].sort(stable=True)
        index = index[order].to(hidden.device)
        counts = torch.bincount(slot, minlength=len(adapters))
        most = int(counts.max())
        if most * len(adapters) == index.numel():
            return Slots(index)
        number = torch.arange(index.numel(), device=slot.device)
        take = slot * most + number - (counts.cumsum(0) - counts)[slot]
        pad = torch.zeros(len(adapters) * most, dtype=torch.long, device=slot.device).scatter(0, take, number)
        return Slots(index, pad.view(len(adapters), most).to(hidden.device), take.to(hidden.device))

    def _whole_prompts(self, places: Layout) -> None:
        here = torch.zeros_like(places.length).masked_fill(places.index >= 0, 1).sum(1)
        expected = torch.where(places.index >= 0, places.length, 0).amax(1)
        if (self.inputs.past or self.inputs.keep) and bool(((here > 0) & (here < expected)).any()):
            raise NoPromptError(
                "This intervention needs all edited tokens of a prompt in one forward pass, but the prompt arrives in "
                "pieces (chunked prefill, or a cache that holds part of it). Read the prompt in one pass."
            )

    def _kept(self, hidden: Tensor) -> int:
        """How many columns hidden (B, L, d) has where these are the pass's last alone, as in those of Gemma 4's blocks
        that share the keys of others; else 0."""
        keep, shape = self.inputs.keep, self.inputs.shape
        return keep if keep and shape is not None and shape[1] > keep == hidden.shape[1] else 0

    def _layout(self, hidden: Tensor) -> Layout:
        kept = self._kept(hidden)
        if kept:
            self.places = self.places or self.inputs.layout(self.prompt)
            return self.places.last(kept)
        if self.places is None or self.places.shape != hidden.shape[:-1]:
            if hidden.dim() != 3:
                raise ValueError(
                    f"The hidden states at this site have the shape {tuple(hidden.shape)}; reftune edits (batch, "
                    "tokens, width). This architecture's block output is not a stream of token states: name another "
                    "component."
                )
            seen = (hidden.shape[0], hidden.shape[1])
            if self.inputs.shape is None:  # images and audio: the tokens are first counted here
                mask = self.inputs.mask
                if mask is not None and tuple(mask.shape) != seen:
                    mask = _of_frames(self.inputs.hears, mask, seen)
                self.inputs = Inputs(seen, mask, device=hidden.device)
            elif self.inputs.shape != seen:
                raise ValueError(
                    f"The model was called with {self.inputs.shape} tokens, but the hidden states at this site have "
                    f"the shape {tuple(hidden.shape)}: their rows are not the input's tokens, so positions cannot be "
                    "told. Name a component whose output is (batch, tokens, width)."
                )
            self.places = self.inputs.layout(self.prompt)
        return self.places


def call_arguments(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[str], Any]:
    """Look-up of a call's arguments by parameter name, positional ones included."""
    positional = dict(zip(names, args, strict=False))
    return lambda name: kwargs.get(name, positional.get(name))
