"""An intervention: a small module h ↦ h + Δ(h), and the registry by which configs name its kinds.

One of your own is a subclass with a formula and a decorator:

    @register_intervention("shift")
    class ShiftIntervention(Intervention):
        def reset_parameters(self) -> None:
            self.b = torch.nn.Parameter(torch.zeros(self.embed_dim))
        def delta(self, h, segments=None):
            return self.b.expand_as(h)

    ReftConfig(intervention="shift", layers="all", positions="all")
"""

import contextlib
import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .choice import Choice
from .slim import SlimModule

Bias = Literal["learned", "frozen", "none"]

_NO_SETTINGS: Mapping[str, Any] = {}  # one for all modules without any
INTERVENTIONS: dict[str, type["Intervention"]] = {}


class Intervention(SlimModule):
    """h + dropout(Δ(h)), the frame that every kind shares.

    Args:
        embed_dim: d, the width of the hidden states.
        low_rank_dimension: r, at most d; kinds without a rank ignore it.
        act_fn: name of a function in `torch.nn.functional` put on the learned source Wh + b, or None.
        dropout: probability, on the edit Δ alone, never on h (pyreft's is on the whole residual).
        bias: b is "learned", "frozen" (kept at its initial value, saved) or "none".
        init_weights: True starts at Δ = 0 where the formula allows it; False starts as pyreft does.
        dtype, device: of the parameters; whatever their dtype, Δ is computed in fp32 or wider.
        settings: further arguments, those that the kind lists in `setting_names`.
    """

    kind: ClassVar[str]
    has_rank: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = False  # R has orthonormal rows
    couples_positions: ClassVar[bool] = False  # Δ of one token depends on other tokens of its prompt
    needs_choice: bool = False  # wants `rows` (N,), the batch row of each h, and the pass's `choice`
    subspaces: tuple[str, ...] = ()  # names by which parts of the edit are switched on and off
    setting_names: ClassVar[tuple[str, ...]] = ()  # what the kind reads from `self.settings`

    b: nn.Parameter | Tensor | None

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int | None = 4,
        *,
        act_fn: str | None = None,
        dropout: float = 0.0,
        bias: Bias = "learned",
        init_weights: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        rank = low_rank_dimension if self.has_rank else None
        if self.has_rank and (not isinstance(rank, int) or not 1 <= rank <= embed_dim):
            raise ValueError(
                "The rank must be a whole number between 1 and the width of the hidden states "
                f"({embed_dim}), but is {rank!r}. Choose such an r."
            )
        unknown = sorted(set(settings) - set(self.setting_names))
        if unknown:
            known = (
                f"Its own are: {', '.join(self.setting_names)}." if self.setting_names else "It has none of its own."
            )
            raise ValueError(f"{type(self).__name__} has no setting {unknown[0]!r}. {known}")
        if bias not in ("learned", "frozen", "none"):
            raise ValueError(f'bias must be "learned", "frozen" or "none", but is {bias!r}.')
        if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is a probability in [0, 1), but is {dropout!r}.")
        self.embed_dim = embed_dim
        self.low_rank_dimension = rank
        self.act_fn = None if act_fn in (None, "linear") else act_fn
        self._activation = activation(self.act_fn)
        self.dropout = dropout
        self.bias_mode = bias
        self.init_weights = init_weights
        self.settings = settings or _NO_SETTINGS
        with torch.device(device) if device is not None else contextlib.nullcontext():
            self.reset_parameters()
        if dtype is not None:
            self.to(dtype)

    def reset_parameters(self) -> None:
        """Create the parameters."""
        raise NotImplementedError

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        """Δ(h), (..., d) → (..., d). `segments` (N,) numbers the prompt of each row when h is a list of rows."""
        raise NotImplementedError

    def forward(
        self,
        h: Tensor,
        segments: Tensor | None = None,
        rows: Tensor | None = None,
        choice: Choice | None = None,
        edit_only: bool = False,
    ) -> Tensor:
        """The edited h, (..., d) → (..., d), computed in fp32 or wider and returned in the dtype of h.

        `rows` (N,) are the batch rows of h (N, d) and `choice` is what the forward pass chooses for them; kinds that
        set `needs_choice` get both. `edit_only` returns what is added to h instead, in fp32 or wider.
        """
        if h.shape[-1] != self.embed_dim:
            raise ValueError(
                f"This {type(self).__name__} edits hidden states of width {self.embed_dim}, "
                f"but the last dimension of {tuple(h.shape)} is {h.shape[-1]}."
            )
        edit = self.edit(h, segments, rows, choice) if self.needs_choice else self.edit(h, segments)
        return edit if edit_only else (h + edit).to(h.dtype)

    def edit(
        self, h: Tensor, segments: Tensor | None = None, rows: Tensor | None = None, choice: Choice | None = None
    ) -> Tensor:
        """What is added to h, (..., d) → (..., d): Δ with its dropout, in fp32 or wider."""
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        # Entering the context takes as long as a third of a small edit, so it is done where there is something to undo.
        casts = torch.is_autocast_enabled(h.device.type)
        with torch.autocast(device_type=h.device.type, enabled=False) if casts else contextlib.nullcontext():
            edit = self.delta(wide, segments) if self.couples_positions else self.delta(wide)
        return nn.functional.dropout(edit, self.dropout) if self.dropout and self.training else edit

    def directions(self) -> tuple[Tensor, Tensor] | None:
        """Rows (k, d) that span what the edit writes, and rows (l, d) that span what it reads of h, as they are now.

        None if it writes or reads all directions, or if the kind does not say: then nothing can be `orthogonal_to` it.
        """
        return None

    def righted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """This module's state dict with the tensors as the next forward pass would make them, to be saved."""
        return state

    def config(self) -> dict[str, Any]:
        """What a config must say to build this module again (its weights aside)."""
        return {
            "intervention": kind_of(type(self)),
            "r": self.low_rank_dimension,
            "act_fn": self.act_fn,
            "dropout": self.dropout,
            "bias": self.bias_mode,
            "init_weights": self.init_weights,
            "intervention_kwargs": dict(self.settings),
        }

    def extra_repr(self) -> str:
        rank = f", r={self.low_rank_dimension}" if self.has_rank else ""
        return f"d={self.embed_dim}{rank}"

    def _register_bias(self, value: Tensor) -> None:
        if self.bias_mode == "learned":
            self.b = nn.Parameter(value)
        elif self.bias_mode == "frozen":
            self.register_buffer("b", value)
        else:
            self.b = None


def register_intervention(kind: str) -> Callable[[type[Intervention]], type[Intervention]]:
    """Class decorator: make the kind known to `ReftConfig(intervention=kind)` and to saved adapters."""

    def add(cls: type[Intervention]) -> type[Intervention]:
        known = INTERVENTIONS.get(kind)
        if known is not None and _name(known) != _name(cls):  # the same class may come again: a notebook's cell
            raise ValueError(f"The intervention kind {kind!r} is {known.__name__} already; choose another name.")
        cls.kind = kind
        INTERVENTIONS[kind] = cls
        return cls

    return add


def kind_of(cls: type[Intervention]) -> str:
    """The kind a class is registered as; a ValueError if it is not (a subclass does not stand for its parent)."""
    kind: str | None = getattr(cls, "kind", None)
    if kind is None or kind not in INTERVENTIONS or _name(INTERVENTIONS[kind]) != _name(cls):
        raise ValueError(
            f"{cls.__name__} is not a registered intervention, so a saved adapter could not name it. Put "
            f'@register_intervention("a_name_of_its_own") above the class.'
        )
    return kind


def _name(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def intervention_class(kind: str) -> type[Intervention]:
    """The class of a kind; an unknown one is a ValueError with the nearest known name."""
    if kind in INTERVENTIONS:
        return INTERVENTIONS[kind]
    near = difflib.get_close_matches(str(kind).lower(), INTERVENTIONS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"Unknown intervention {kind!r}.{hint} Known: {', '.join(sorted(INTERVENTIONS))}. One of your own must be "
        "imported (its @register_intervention run) before a config names it."
    )


def in_precision_of(h: Tensor, *values: Tensor | None) -> list[Any]:
    """The values in the dtype of h, None staying None: PEFT and TRL may have cast parameters to bf16."""
    return [None if value is None else value.to(h.dtype) for value in values]


def activation(name: str | None) -> Callable[[Tensor], Tensor] | None:
    """The function of this name in torch.nn.functional, or None; an unknown one is a ValueError."""
    if name is None:
        return None
    allowed = ("relu", "gelu", "silu", "tanh", "sigmoid", "softplus", "leaky_relu", "elu", "selu", "mish")
    if name not in allowed:
        raise ValueError(f"Unknown act_fn {name!r}. Known: linear, {', '.join(allowed)}.")
    return getattr(nn.functional, name)  # type: ignore[no-any-return]
