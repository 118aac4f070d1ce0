"""Adapters as things to add up: `style + 0.5 * tone`, on for a `with` block or from now on.

    style, tone = reftune.adapters(model, "style", "tone")
    mix = style + 0.5 * tone                      # h + Δ_style(h) + 0.5 Δ_tone(h)
    with mix.on(model):
        model.generate(...)
    mix.apply(model)                              # from now on; mix.remove(model) ends it
    (style >> tone).apply(model)                  # a sequence: tone edits what style left
    with reftune.strength(model, {"tone": 0.2}):  # what is on, with another strength
        model.generate(...)

`reftune.compose({"style": 1.0, "tone": 0.5})` is the same without a model at hand.
"""

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import Any

from ..tuner import ReftModel
from ..tuner.mix import How, Mix
from ..tuner.with_lora import check_composed


@dataclass(frozen=True, eq=False, repr=False)
class Composition:
    """Adapters with strengths, to be added up (`how="sum"`) or made one after the other (`"sequence"`). Immutable.

    Sums can be added, subtracted and multiplied by numbers; `a >> b` is a sequence. Raises ValueError for strengths
    that are not finite, for adapters of two models, and for the algebra that a sequence does not have.
    """

    strengths: Mapping[str, float]
    how: How = "sum"
    model: InitVar[Any] = None  # whose adapters they are, if that is known already
    _model: "weakref.ref[ReftModel] | None" = field(default=None, init=False, repr=False)

    def __post_init__(self, model: Any) -> None:
        mix = Mix(dict(self.strengths), self.how)  # checks them
        strengths = MappingProxyType({name: float(strength) for name, strength in mix.strengths.items()})
        object.__setattr__(self, "strengths", strengths)
        object.__setattr__(self, "_model", None if model is None else weakref.ref(tuner_of(model)))

    def __reduce__(self) -> Any:  # copies and pickles are of no model
        return Composition, (dict(self.strengths), self.how)

    # -- algebra --------------------------------------------------------------------------------------------------

    def __add__(self, other: "Composition") -> "Composition":
        if not isinstance(other, Composition):
            return NotImplemented
        for part in (self, other):
            if part.how == "sequence" and len(part.strengths) > 1:
                raise ValueError(f"{part} is a sequence, and a sum cannot hold it: bake it into one adapter first.")
        total = dict(self.strengths)
        for name, strength in other.strengths.items():
            total[name] = total.get(name, 0.0) + strength
        return self._with(total, "sum", other)

    def __mul__(self, factor: float) -> "Composition":
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"The strength of {self} must be a finite number, but is {factor!r}.")
        if self.how == "sequence" and len(self.strengths) > 1:
            raise ValueError(f"{self} is a sequence, which has no multiple: give its adapters strengths of their own.")
        return self._with({name: factor * strength for name, strength in self.strengths.items()}, self.how)

    __rmul__ = __mul__

    def __neg__(self) -> "Composition":
        return self * -1.0

    def __sub__(self, other: "Composition") -> "Composition":
        return self + -other if isinstance(other, Composition) else NotImplemented

    def __rshift__(self, other: "Composition") -> "Composition":
        """`style >> tone`: tone edits what style left."""
        if not isinstance(other, Composition):
            return NotImplemented
        for part in (self, other):
            if part.how == "sum" and len(part.strengths) > 1:
                raise ValueError(f"{part} is a sum, and a sequence cannot hold it: bake it into one adapter first.")
        twice = [name for name in other.strengths if name in self.strengths]
        if twice:
            raise ValueError(f"Adapter {twice[0]!r} comes twice in this sequence: a composition has each adapter once.")
        return self._with({**self.strengths, **other.strengths}, "sequence", other)

    def _with(self, strengths: dict[str, float], how: How, other: "Composition | None" = None) -> "Composition":
        models = [m for m in (self._bound(), other._bound() if other is not None else None) if m is not None]
        if len(models) == 2 and models[0] is not models[1]:
            raise ValueError(f"{self} and {other} are adapters of two models: load both into one to compose them.")
        return Composition(strengths, how, model=models[0] if models else None)

    def _bound(self) -> ReftModel | None:
        return self._model() if self._model is not None else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Composition) or self.how != other.how:
            return NotImplemented if not isinstance(other, Composition) else False
        if self.how == "sequence":
            return list(self.strengths.items()) == list(other.strengths.items())
        return dict(self.strengths) == dict(other.strengths)

    def __hash__(self) -> int:
        return hash((frozenset(self.strengths.items()), self.how))

    def __repr__(self) -> str:
        join = " + " if self.how == "sum" else " >> "
        parts = (name if strength == 1 else f"{strength:g} * {name}" for name, strength in self.strengths.items())
        return join.join(parts) or "no adapter"

    # -- use --------------------------------------------------------------------------------------------------------

    @property
    def mix(self) -> Mix:
        """What the model's session takes."""
        return Mix(dict(self.strengths), self.how)

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """These adapters, and no others, within the block, for this thread."""
        with self._ready(model).session.mixing(self.mix):
            yield

    def apply(self, model: Any) -> None:
        """These adapters, and no others, from now on."""
        self._ready(model).session.mix = self.mix

    @staticmethod
    def remove(model: Any) -> None:
        """End what `apply` began: the adapters that `set_adapter` named are the active ones again."""
        tuner_of(model).session.mix = None

    def _ready(self, model: Any) -> ReftModel:
        tuner = self._fits(model)
        check_composed(tuner.model, self.mix.active())
        return tuner

    def _fits(self, model: Any) -> ReftModel:
        tuner, bound = tuner_of(model), self._bound()
        if bound is not None and bound is not tuner:
            raise ValueError(f"{self} are adapters of another model than this one: load them here first.")
        known(tuner, self.strengths)
        for name, strength in self.strengths.items():
            more = tuner.peft_config[name].beside_edits()
            if more and strength and name not in tuner.active_adapters:
                raise ValueError(
                    f"Adapter {name!r} also trained {more}, and a strength says nothing about those: make it the "
                    f"active adapter first, model.set_adapter({name!r}), so that they are in use."
                )
        return tuner


def compose(strengths: Mapping[str, float], how: How = "sum") -> Composition:
    """Adapters by name, each with a strength: `compose({"style": 1.0, "tone": 0.5})`, summed or in sequence.

    Names are looked up when the composition is used. Raises ValueError for strengths that are not finite numbers.
    """
    return Composition(strengths, how)


def adapters(model: Any, *names: str) -> tuple[Composition, ...]:
    """Handles of a model's adapters, all of them if none is named: `style, tone = adapters(model, "style", "tone")`.

    Raises ValueError for names that the model does not have.
    """
    tuner = tuner_of(model)
    known(tuner, names)
    return tuple(Composition({name: 1.0}, model=model) for name in names or tuner.peft_config)


@contextmanager
def strength(model: Any, strengths: Mapping[str, float]) -> Iterator[None]:
    """Other strengths within the block: of the composition that is on, or of the active adapters.

    An adapter that is not on yet is added at the end. Names not given keep their strength.
    """
    tuner = tuner_of(model)
    known(tuner, strengths)
    now = current(model)
    with Composition({**now.strengths, **strengths}, now.how).on(model):
        yield


def current(model: Any) -> Composition:
    """What the model computes now: the composition that is on, or its active adapters, one after the other."""
    tuner = tuner_of(model)
    mix = tuner.session.state.mix or tuner.session.mix
    if mix is not None:
        return Composition(dict(mix.strengths), mix.how, model=model)
    return Composition(dict.fromkeys(tuner.active_adapters, 1.0), "sequence", model=model)


def bake(model: Any, composition: Composition, adapter_name: str, rank: int | None = None) -> Any:
    """Make a composition one adapter: `add_weighted_adapter` with its names, strengths and order."""
    tuner = composition._fits(model)
    return tuner.add_weighted_adapter(
        list(composition.strengths), list(composition.strengths.values()), adapter_name, composition.how, rank
    )


def tuner_of(model: Any) -> ReftModel:
    """The ReftModel inside a PeftModel; a TypeError for models that have none."""
    tuner = model if isinstance(model, ReftModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, ReftModel):
        raise TypeError(
            f"Compositions are for a PeftModel with ReFT adapters, but this is a {type(model).__name__}: use "
            "get_reft_model or PeftModel.from_pretrained."
        )
    return tuner


def known(tuner: ReftModel, names: Any) -> None:
    """Refuse names of adapters that the model does not have."""
    for name in names:
        if name not in tuner.peft_config:
            raise ValueError(f"There is no adapter {name!r}; this model has {sorted(tuner.peft_config)}.")
