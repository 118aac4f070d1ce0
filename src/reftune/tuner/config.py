"""`ReftConfig`: what to edit (layers, component, positions) and with which intervention, in PEFT's config format."""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig

from ..interventions import Intervention, intervention_class, kind_of
from ..positions import groups, parse
from .registration import PEFT_TYPE

_EDIT = ("r", "intervention", "act_fn", "dropout", "bias", "init_weights", "intervention_kwargs")


@dataclass
class ReftConfig(PeftConfig):
    """Configuration of a representation-finetuning adapter (Wu et al. 2024, arXiv 2404.03592).

    Args:
        r: rank of the intervention, the number of rows of R.
        layers: blocks to edit: "mid" (num_hidden_layers // 2), "all", a list (negative numbers too), or a depth range
            such as "50%-70%".
        positions: tokens to edit, such as "f2+l2"; see `reftune.positions.grammar`.
        component: "block_output", "block_input", "attention_output", "mlp_output", or a module path ending in
            ".output" or ".input".
        intervention: kind, or its class: "loreft", "noreft", "consreft", "lobireft", "direft", "nodireft" (the
            paper's DiReFT), "red", "reft_r1", "postblock", or one registered with `register_intervention`.
        share_weights: one intervention per layer for all terms of `positions`, instead of one per term.
        act_fn: function on the learned source Wh + b, a name in torch.nn.functional.
        dropout: probability, on the edit alone.
        bias: "learned", "frozen" or "none".
        init_weights: True starts with an edit that is exactly zero; False starts as pyreft does.
        intervention_kwargs: further arguments of the intervention's class.
        modules_to_save: further modules to train and save whole, such as a classification head.
        representations: pyreft's form, a dict or a list of dicts with "layer" (or a path in "component"),
            "component", "intervention" (a module, whose weights are used), "low_rank_dimension", and optionally
            "positions". Settings that all of them share may be given once, above.
    """

    r: int = field(default=4, metadata={"help": "Rank of the intervention."})
    layers: str | int | list[int] = field(default="mid", metadata={"help": "Blocks to edit."})
    positions: str = field(default="f2+l2", metadata={"help": "Tokens to edit."})
    component: str = field(default="block_output", metadata={"help": "What to edit in a block."})
    intervention: Any = field(default="loreft", metadata={"help": "Kind of the intervention."})
    share_weights: bool = field(default=False, metadata={"help": "One intervention per layer for all terms."})
    act_fn: str | None = field(default=None, metadata={"help": "Function on the learned source."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the edit."})
    bias: Literal["learned", "frozen", "none"] = field(default="learned", metadata={"help": "What becomes of b."})
    init_weights: bool = field(default=True, metadata={"help": "Start with an edit that is exactly zero."})
    intervention_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Further arguments of the intervention's class."}
    )
    representations: Any = field(default=None, metadata={"help": "pyreft's form: one dict per site."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Not used; TRL and PEFT read it."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Edited modules; filled in by us."})
    trainable_token_indices: Any = field(default=None, metadata={"help": "Tokens whose embeddings are trained."})
    base_model_shape: dict[str, Any] | None = field(
        default=None, metadata={"help": "Architecture, width and depth of the base; filled in when it is attached."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.from_file = self.base_model_shape is not None  # then it must fit the base; a new one fits any
        self._given: dict[int, Intervention] = {}
        if isinstance(self.intervention, Intervention):
            self._given[0] = self.intervention
            for key, value in self.intervention.config().items():
                setattr(self, key, value)
        elif isinstance(self.intervention, type):
            self.intervention = _kind(self.intervention)
        if self.representations is not None:
            self._read_representations()
        for edit in self.edits():
            parse(edit["positions"])
            cls = intervention_class(edit["intervention"])
            rank = edit["r"]
            if cls.has_rank and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
                raise ValueError(f"r must be a whole number of at least 1, but is {rank!r}.")
        if self.bias not in ("learned", "frozen", "none"):
            raise ValueError(f'bias must be "learned", "frozen" or "none", but is {self.bias!r}.')

    def _read_representations(self) -> None:
        """pyreft's dicts → plain, savable ones; modules given in them are kept aside, to be copied into the model."""
        entries = self.representations
        entries = [entries] if isinstance(entries, dict) else entries
        if not isinstance(entries, (list, tuple)):
            raise ValueError(f"representations must be a dict or a list of dicts, but is {entries!r}.")
        if not entries:
            raise ValueError("representations is empty: give at least one {'layer': ..., 'intervention': ...}.")
        known = {"layer", "component", "positions", "low_rank_dimension", "intervention_type", *_EDIT}
        plain = []
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(
                    f"representations[{number}] must be a dict such as {{'layer': 3, 'low_rank_dimension': 4}}, but is "
                    f"{entry!r}."
                )
            unknown = set(entry) - known
            if unknown:
                raise ValueError(
                    f"representations[{number}] has unknown keys {sorted(unknown)}. Known: {', '.join(sorted(known))}."
                )
            given = entry.get("intervention", entry.get("intervention_type", self.intervention))
            edit = {key: entry.get(key, getattr(self, key)) for key in _EDIT}
            if isinstance(given, Intervention):
                self._given[number] = given
                edit |= given.config()
            else:
                edit["intervention"] = _kind(given) if isinstance(given, type) else given
                edit["r"] = entry.get("low_rank_dimension", edit["r"])
            edit["component"] = entry.get("component", self.component)
            edit["layer"] = entry.get("layer")
            edit["positions"] = entry.get("positions", self.positions)
            if edit["layer"] is None and not edit["component"].endswith((".output", ".input")):
                raise ValueError(f"representations[{number}] names no layer and no module path in 'component'.")
            for key in ("low_rank_dimension", "r"):
                rank = entry.get(key)
                if number in self._given and rank not in (None, given.low_rank_dimension):
                    raise ValueError(
                        f"representations[{number}] says {key}={rank}, but its intervention has rank "
                        f"{given.low_rank_dimension}."
                    )
            plain.append(edit)
        self.representations = plain
        for key in _EDIT:
            setattr(self, key, plain[0][key])
        self.share_weights = True  # one module is one intervention, whatever terms its positions have

    def edits(self) -> list[dict[str, Any]]:
        """What to build, one dict per (layers, component): its settings, positions and the module given for it."""
        if self.representations is not None:
            return [
                {**e, "layers": e["layer"], "given": self._given.get(i)} for i, e in enumerate(self.representations)
            ]
        edit = {key: getattr(self, key) for key in (*_EDIT, "layers", "component", "positions")}
        return [{**edit, "given": self._given.get(0)}]

    def groups(self, positions: str) -> tuple[str, ...]:
        """The expressions that get an intervention each."""
        return groups(positions, self.share_weights)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The config of a saved adapter.

        `adapter_model.safetensors` carries the config it was saved with; where a save was cut off between the two
        files, that one holds, because it belongs to the weights.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        from .atomic import config_beside_weights

        committed = config_beside_weights(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        if committed is None:
            return config
        return cls.from_peft_type(**cls.check_kwargs(**json.loads(committed)))


def _kind(cls: type) -> str:
    if not issubclass(cls, Intervention):
        raise ValueError(f"intervention must be a kind, a reftune.Intervention or its class, but is {cls.__name__}.")
    return kind_of(cls)
