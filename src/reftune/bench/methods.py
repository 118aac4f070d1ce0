"""The methods that are compared, each a table entry: every ReFT kind, LoRA, DoRA, AdaLoRA, full, probe, base.

A ReFT kind is any that is registered, so one's own are compared as the others are.

method = resolve("loreft", "glue", {})                                     # the entry with the suite's defaults
method = resolve({"name": "loreft-l1", "method": "loreft", "positions": "l1", "r": 4}, "commonsense", {})
model, counts = attach(base, method, head=["classifier"], steps=100)
"""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from reftune.interventions import INTERVENTIONS

# Peak learning rates of the sweep, the same number for every method. A best one at an end of its three is marked in
# the reports: widen `lrs` then.
_REFT = (3e-4, 1e-3, 3e-3)
_LORA = (1e-4, 3e-4, 1e-3)
_FULL = (1e-5, 3e-5, 1e-4)
_GLUE = {"reft": (1e-3, 3e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 3e-4), "probe": _REFT}

REFT_KINDS = ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft", "red", "reft_r1", "postblock")
PEFT_KINDS = ("lora", "dora", "adalora")
_OTHERS = (*PEFT_KINDS, "full", "probe", "base")
METHODS = (*REFT_KINDS, *_OTHERS)

# What the paper uses, by suite: tied f7+l7 in all layers at rank 8; on GLUE the first tokens at rank 1.
_PAPER: dict[str, dict[str, Any]] = {
    "commonsense": {"r": 8, "layers": "all", "positions": "f7+l7", "share_weights": True},
    "arithmetic": {"r": 8, "layers": "all", "positions": "f7+l7", "share_weights": True},
    "instruct": {"r": 4, "layers": "all", "positions": "f5+l5", "share_weights": False},
    "glue": {"r": 1, "layers": "all", "positions": "f3"},
}
_OWN: dict[str, dict[str, Any]] = {
    "red": {"layers": "all", "positions": "all"},
    "reft_r1": {"layers": "all", "positions": "all"},
    "postblock": {"layers": "all", "positions": "all", "r": 8},
}
_PEFT: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "dora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "use_dora": True},
    "adalora": {"init_r": 24, "target_r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
}


@dataclass(frozen=True)
class Method:
    """A method with its settings. `name` is what reports call it; options are `ReftConfig`'s or PEFT's fields."""

    name: str
    method: str
    lrs: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)  # overrides of the budget, such as a preset's warm-up
    init_rows: int = 0  # NodiReFT and LoRA: training rows by whose loss it starts (see `attach`); 0: at random

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a row of results."""
        plain = asdict(self) | {"lrs": list(self.lrs)}
        if not self.init_rows:  # so that runs keep the names that they had before there was such a key
            del plain["init_rows"]
        return plain


@dataclass(frozen=True)
class Counts:
    """Numbers trained: by the method; by the head that all methods train; in the whole model."""

    trainable: int
    head: int
    total: int


def resolve(entry: str | Mapping[str, Any], suite: str, reft: Mapping[str, Any]) -> Method:
    """A grid's entry with defaults filled in; `reft` holds the grid's settings for the low-rank ReFT kinds and
    for registered ones.

    Raises ValueError for an unknown method or a misplaced `lrs`.
    """
    if not isinstance(entry, str | Mapping):
        raise ValueError(f"A method is a name or {{name:, method:, lrs:, ...}}, but got {entry!r}.")
    given: dict[str, Any] = {"method": entry} if isinstance(entry, str) else dict(entry)
    method = given.pop("method", given.get("name"))
    if method not in METHODS and not is_reft(method):
        known = dict.fromkeys((*METHODS, *INTERVENTIONS))
        near = difflib.get_close_matches(str(method), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
        raise ValueError(f"There is no method {method!r}.{hint}")
    name = str(given.pop("name", method))
    lrs, train, init_rows = given.pop("lrs", None), given.pop("train", {}), given.pop("init_rows", 0)
    if lrs is not None:
        lrs = rates(lrs, name)
    if not isinstance(train, Mapping):
        raise ValueError(f"train of {name} must be keys with values, such as {{epochs: 3}}, but is {train!r}.")
    if not isinstance(init_rows, int) or isinstance(init_rows, bool) or init_rows < 0:
        raise ValueError(f"init_rows of {name} must be a number of training rows, such as 32, but is {init_rows!r}.")
    if init_rows and method not in ("nodireft", "lora"):
        raise ValueError(f"{name}: init_rows is a start of NodiReFT's and LoRA's, and {method} has none of this kind.")
    if is_reft(method) and method not in _OWN:
        options = _PAPER[suite] | dict(reft)
    else:
        options = dict(_OWN.get(method, _PEFT.get(method, {})))
        if method == "red" and suite != "glue":
            options["component"] = "mlp_output"  # as RED's authors; BERT has no module for it: the block's output
    other = {"stack", "subspaces", "init_weights", "init_lora_weights", "lora_ga_config"} & {*options, *given}
    if init_rows and other:
        raise ValueError(f"{name}: init_rows is a start of its own, which {sorted(other)[0]} does not go with.")
    if method in ("full", "probe", "base") and given:
        raise ValueError(f"{name}: {method} has no settings, but got {', '.join(given)}.")
    return Method(name, method, _lrs(method, suite) if lrs is None else lrs, options | given, dict(train), init_rows)


def is_reft(method: Any) -> bool:
    """Whether a method is a kind of intervention: one of `REFT_KINDS`, or another that is registered."""
    return isinstance(method, str) and method in INTERVENTIONS and method not in _OTHERS


def rates(lrs: Any, where: str) -> tuple[float, ...]:
    """Learning rates as given in a grid. Raises ValueError unless they are a list of positive numbers."""
    numbers = isinstance(lrs, list | tuple) and all(isinstance(x, int | float) and 0 < x < inf for x in lrs)
    if not numbers or not lrs:
        raise ValueError(f"lrs of {where} must be positive numbers such as [1.0e-4, 3.0e-4], but are {lrs!r}.")
    return tuple(map(float, lrs))


def _lrs(method: str, suite: str) -> tuple[float, ...]:
    if method == "base":
        return ()
    family = "reft" if is_reft(method) else "lora" if method in PEFT_KINDS else method
    if suite == "glue":
        return _GLUE[family]
    return {"reft": _REFT, "lora": _LORA, "full": _FULL, "probe": _FULL}[family]


def configuration(method: Method, *, head: list[str], steps: int) -> Any:
    """The method's config: a `ReftConfig`, one of PEFT's, or None for full, probe and base.

    Raises ValueError or TypeError for settings that these do not know or refuse.
    """
    from peft import AdaLoraConfig, LoraConfig, LoraGAConfig

    from reftune import ReftConfig

    shared: dict[str, Any] = {"task_type": "SEQ_CLS" if head else "CAUSAL_LM", "modules_to_save": head or None}
    if is_reft(method.method):
        return ReftConfig(intervention=method.method, **method.options, **shared)
    if method.method not in PEFT_KINDS:
        return None
    if head:
        shared["exclude_modules"] = rf".*\b({'|'.join(head)})\b.*"
    if method.method == "adalora":
        if steps < 2:
            raise ValueError("AdaLoRA shares its ranks out by the gradients of earlier steps: give it two at least.")
        plan = {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 3, "deltaT": max(1, steps // 50)}
        return AdaLoraConfig(**(plan | method.options), **shared)
    if method.init_rows:
        shared |= {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    return LoraConfig(**method.options, **shared)


def attach(
    model: Any, method: Method, *, head: list[str], steps: int, batches: Sequence[Mapping[str, Any]] = ()
) -> tuple[Any, Counts]:
    """The model made ready to train by a method, and what is trained.

    Args:
        model: a base model, which is changed.
        head: modules of a classifier that every method trains too ([] for a causal model); counted apart.
        steps: optimiser steps of the run; AdaLoRA plans its ranks by them.
        batches: the method's `init_rows`, from whose loss NodiReFT starts by `initialize_reft_weights` and LoRA by
            PEFT's LoRA-GA (arXiv 2407.05000) with its defaults, which changes the base's weights.
    """
    from peft import get_peft_model
    from peft.tuners.lora import preprocess_loraga
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    from reftune import get_reft_model, initialize_reft_weights

    config = configuration(method, head=head, steps=steps)
    if is_reft(method.method):
        model = get_reft_model(model, config)
        if method.init_rows:
            initialize_reft_weights(model, batches)
    elif method.method in PEFT_KINDS:
        if method.init_rows:
            config = _maybe_include_all_linear_layers(config, model)  # LoRA-GA does not know "all-linear"
            with warnings.catch_warnings():  # of the hooks by which it counts, on layers that see no gradient
                warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
                preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in batches])
        model = get_peft_model(model, config)
    elif method.method == "full":
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
        if method.method == "probe":
            _train_head(model, head)
    return model, count(model, head)


def _train_head(model: Any, head: list[str]) -> None:
    """The head alone: a classifier's own, or a causal model's output layer, untied from its embeddings."""
    if head:
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in head:
                module.requires_grad_(True)
        return
    import torch

    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    model.config.tie_word_embeddings = False
    output.requires_grad_(True)


def count(model: Any, head: list[str]) -> Counts:
    """What is trained of a model, the head's share apart."""
    trainable = apart = 0
    seen: set[int] = set()
    total = sum(p.numel() for p in model.parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if set(name.split(".")) & set(head):
            apart += parameter.numel()
        else:
            trainable += parameter.numel()
    return Counts(trainable, apart, total)
