"""`ReftConfig`: what to edit (layers, component, positions) and with which intervention, in PEFT's config format."""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig

from ..interventions import (
    Intervention,
    LowRankIntervention,
    check_stack,
    check_subspaces,
    intervention_class,
    kind_of,
)
from ..interventions.base import activation
from ..interventions.nested import nested_ranks
from ..positions import groups, parse
from .registration import PEFT_TYPE

_EDIT = (
    *("r", "intervention", "act_fn", "dropout", "bias", "init_weights", "intervention_kwargs"),
    *("subspaces", "stack", "between", "nested"),
)

_NO_MODULES: dict[int, Intervention] = {}
_MAPPINGS: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
_NO_KWARGS: dict[str, Any] = {}


@dataclass
class ReftConfig(PeftConfig):
    """Configuration of a representation-finetuning adapter (Wu et al. 2024, arXiv 2404.03592).

    Args:
        r: rank of the intervention, the number of rows of R.
        layers: blocks to edit: "mid" (num_hidden_layers // 2), "all", a list (negative numbers too), or a depth range
            such as "50%-70%".
        positions: tokens to edit, such as "f2+l2"; see `reftune.positions.grammar`.
        component: "block_output", "block_input", "attention_output", "attention_input", "mlp_output", "mlp_input", or a
            module path ending in ".output" or ".input", from the model ("model.layers[3].mlp.output", whatever `layers`
            says) or from the block ("mlp.down_proj.input"). A list edits each of them, with weights of its own.
        intervention: kind, or its class: "loreft", "noreft", "consreft", "lobireft", "direft", "nodireft" (the
            paper's DiReFT), "red", "reft_r1", "postblock", or one registered with `register_intervention`.
        share_weights: one intervention per layer for all terms of `positions`, instead of one per term.
        act_fn: function on the learned source Wh + b, a name in torch.nn.functional.
        dropout: probability, on the edit alone.
        bias: "learned", "frozen" or "none".
        init_weights: True starts with an edit that is exactly zero; False starts as pyreft does.
        intervention_kwargs: further arguments of the intervention's class.
        subspaces: task → rows: the r rows are divided among tasks, trained and switched on apart (see
            `reftune.interventions.subspaces`).
        stack: ranks of several interventions at each site, one after the other; r is then their sum.
        between: function through which a stage of the stack sees the edits before it, or None.
        nested: True, or a list of ranks: train so that the first k rows are a good adapter of rank k.
        orthogonal_to: adapters of the same model whose directions this one stays out of, at the sites they share.
        lora: a `LoraConfig` (or its dict): a LoRA adapter that is part of this one (see `reftune.tuner.with_lora`).
        modules_to_save: further modules to train and save whole, such as a classification head.
        representations: pyreft's form, a dict or a list of dicts with "layer" (or a path in "component"),
            "component", "intervention" (a module, whose weights are used), "low_rank_dimension", and optionally
            "positions". Settings that all of them share may be given once, above.
    """

    r: int = field(default=4, metadata={"help": "Rank of the intervention."})
    layers: str | int | list[int] = field(default="mid", metadata={"help": "Blocks to edit."})
    positions: str = field(default="f2+l2", metadata={"help": "Tokens to edit."})
    component: str | list[str] = field(default="block_output", metadata={"help": "What to edit in a block."})
    intervention: Any = field(default="loreft", metadata={"help": "Kind of the intervention."})
    share_weights: bool = field(default=False, metadata={"help": "One intervention per layer for all terms."})
    act_fn: str | None = field(default=None, metadata={"help": "Function on the learned source."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the edit."})
    bias: Literal["learned", "frozen", "none"] = field(default="learned", metadata={"help": "What becomes of b."})
    init_weights: bool = field(default=True, metadata={"help": "Start with an edit that is exactly zero."})
    intervention_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Further arguments of the intervention's class."}
    )
    subspaces: dict[str, int] | None = field(default=None, metadata={"help": "Task → rows of its own, of the r."})
    stack: list[int] | None = field(default=None, metadata={"help": "Ranks of interventions one after the other."})
    between: str | None = field(default=None, metadata={"help": "Function between the stages of a stack."})
    nested: bool | list[int] = field(default=False, metadata={"help": "Train all ranks up to r, or these, at once."})
    orthogonal_to: list[str] | None = field(default=None, metadata={"help": "Adapters to stay out of the way of."})
    lora: Any = field(default=None, metadata={"help": "A LoRA adapter that belongs to this one."})
    representations: Any = field(default=None, metadata={"help": "pyreft's form: one dict per site."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Refused; TRL and PEFT read it."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Edited modules; filled in by us."})
    trainable_token_indices: Any = field(default=None, metadata={"help": "Tokens whose embeddings are trained."})
    base_model_shape: dict[str, Any] | None = field(
        default=None, metadata={"help": "Architecture, width and depth of the base; filled in when it is attached."}
    )

    _given = _NO_MODULES  # those in `intervention` or `representations`, by number; not a field, so never saved

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.from_file = self.base_model_shape is not None  # then it must fit the base; a new one fits any
        self.rows_kept: int | None = None  # of a saved adapter that is loaded at a lower rank
        self._given = {}
        if isinstance(self.orthogonal_to, str):
            self.orthogonal_to = [self.orthogonal_to]
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if isinstance(self.layers, (range, tuple)):  # JSON has neither
            self.layers = list(self.layers)
        self._check_places()
        self.intervention_kwargs = self.intervention_kwargs or {}
        if isinstance(self.lora, PeftConfig):
            self.lora = plain_config(self.lora)
        if isinstance(self.intervention, Intervention):
            self._given[0] = self.intervention
            for key, value in self.intervention.config().items():
                setattr(self, key, value)
        elif isinstance(self.intervention, type):
            self.intervention = _kind(self.intervention)
        if self.representations is not None:
            self._read_representations()
        elif self.stack is not None:
            check_stack(self.stack)
            self.r = sum(self.stack)
        _check_components(self.component)
        for edit in self.edits():
            parse(edit["positions"])
            cls = intervention_class(edit["intervention"])
            rank = edit["r"]
            if cls.has_rank and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
                raise ValueError(f"r must be a whole number of at least 1, but is {rank!r}.")
            _check_form(edit)
            if not isinstance(edit["init_weights"], bool):
                raise ValueError(f"init_weights must be True or False, but is {edit['init_weights']!r}.")
        if not isinstance(self.share_weights, bool):
            raise ValueError(f"share_weights must be True or False, but is {self.share_weights!r}.")
        if self.bias not in ("learned", "frozen", "none"):
            raise ValueError(f'bias must be "learned", "frozen" or "none", but is {self.bias!r}.')

    def _check_places(self) -> None:
        """PEFT's words for where a method goes say nothing here, so they are refused where a user gives them."""
        for key in ("target_modules", "exclude_modules"):
            if getattr(self, key) is not None and not self.from_file:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is not how ReFT is placed: say layers=[...] and component=..., "
                    "such as 'block_output' or a module's path in the block, 'self_attn.q_proj.output'."
                )

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
            elif edit["stack"] is not None:
                check_stack(edit["stack"])
                edit |= {"intervention": given, "r": sum(edit["stack"])}
            else:
                edit["intervention"] = _kind(given) if isinstance(given, type) else given
                edit["r"] = entry.get("low_rank_dimension", edit["r"])
            edit["component"] = entry.get("component", self.component)
            if not isinstance(edit["component"], str):
                raise ValueError(
                    f"representations[{number}] is one place, but its component is {edit['component']!r}: give each an "
                    "entry of its own."
                )
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
        edit = {key: getattr(self, key) for key in (*_EDIT, "layers", "positions")}
        components = self.component if isinstance(self.component, list) else [self.component]
        return [{**edit, "component": name, "given": self._given.get(0)} for name in components]

    def beside_edits(self) -> str:
        """What the adapter trains besides its edits and its LoRA part, in words; "" where that is nothing."""
        parts = [f"{self.modules_to_save} whole"] if self.modules_to_save else []
        parts += ["the embeddings of single tokens (trainable_token_indices)"] if self.trainable_token_indices else []
        return " and ".join(parts)

    def slim(self) -> None:
        """Keep what differs from the class's defaults, which are found there: thousands may be resident at once."""
        self.intervention_kwargs = self.intervention_kwargs or _NO_KWARGS
        mapping: dict[str, str] | None = self.__dict__.get("auto_mapping")
        if mapping:  # equal in all adapters of a base, but each file's reading makes its own
            self.__dict__["auto_mapping"] = _MAPPINGS.setdefault(tuple(sorted(mapping.items())), mapping)
        self.__dict__ = {
            k: v for k, v in self.__dict__.items() if not hasattr(type(self), k) or v != getattr(type(self), k)
        }

    def groups(self, positions: str) -> tuple[str, ...]:
        """The expressions that get an intervention each."""
        return groups(positions, self.share_weights)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, rank: int | None = None, **kwargs: Any
    ) -> Any:
        """The config of a saved adapter.

        With `rank`, that of its first `rank` rows: `PeftModel.from_pretrained(model, path, config=config)` then loads
        those alone (see `truncation`). ValueError where the rows cannot be cut.

        `adapter_model.safetensors` carries the config it was saved with; where a save was cut off between the two
        files, that one holds, because it belongs to the weights.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        from .atomic import config_beside_weights

        committed = config_beside_weights(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        if committed is not None:
            config = cls.from_peft_type(**cls.check_kwargs(**json.loads(committed)))
        if rank is not None:
            from .truncation import truncate_config

            truncate_config(config, rank)
        return config


def _kind(cls: type) -> str:
    if not issubclass(cls, Intervention):
        raise ValueError(f"intervention must be a kind, a reftune.Intervention or its class, but is {cls.__name__}.")
    return kind_of(cls)


def _check_components(component: Any) -> None:
    names = component if isinstance(component, list) else [component]
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"component must be a name such as 'block_output', or a list of different ones, but is {component!r}."
        )


def _check_form(edit: dict[str, Any]) -> None:
    """Subspaces, a stack and nested ranks: one of them, and what it says can be meant."""
    cls = intervention_class(edit["intervention"])
    chosen = [key for key in ("subspaces", "stack", "nested") if edit[key] not in (None, False)]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0]} and {chosen[1]} cannot be had at once: choose one.")
    if chosen and not (issubclass(cls, LowRankIntervention) and cls.has_rank):
        raise ValueError(
            f"{chosen[0]}={edit[chosen[0]]!r} needs a kind of the low-rank family, such as 'loreft', but intervention "
            f"is {edit['intervention']!r}."
        )
    if edit["subspaces"] is not None:
        check_subspaces(edit["subspaces"])
        if sum(edit["subspaces"].values()) != edit["r"]:
            raise ValueError(
                f"subspaces={edit['subspaces']!r} divide {sum(edit['subspaces'].values())} rows, but r={edit['r']}: "
                f"set r={sum(edit['subspaces'].values())}."
            )
    if edit["nested"]:
        nested_ranks(edit["nested"], edit["r"])
    if edit["between"] is not None:
        if edit["stack"] is None:
            raise ValueError(f"between={edit['between']!r} is a function between the stages of a stack: set stack.")
        activation(None if edit["between"] == "linear" else edit["between"])


def plain_config(config: PeftConfig) -> dict[str, Any]:
    """A config of PEFT as plain data that goes into JSON: sets become lists, enums their values."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=_plain))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    raise ValueError(f"The LoRA config holds {value!r}, which a saved adapter cannot: {type(value).__name__}.")
