"""LoRA and ReFT on one model: a ReFT adapter that has a LoRA part, trained, saved, loaded and switched with it.

    model = get_reft_model(base, ReftConfig(lora=LoraConfig(r=8, ...)))            # both from the start
    model = get_reft_model(PeftModel.from_pretrained(base, "runs/lora"), config)   # ReFT on a trained LoRA

PEFT keeps one tuner a PeftModel. Here the PeftModel is ReFT's; PEFT's own `LoraModel` puts the LoRA layers into the
same base under the adapter's name. Their weights lie in the same file, under the keys that PEFT gives them, and their
config in `adapter_config.json`, so that a Trainer's checkpoints, resuming and the best model need nothing more.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import ReftConfig
from .layer import ReftLayer
from .session import ATTRIBUTE

RECORD = "_reft_lora"
_STARTS = (True, False, "gaussian", "orthogonal")


@dataclass
class Lora:
    """The LoRA layers of a base model."""

    tuner: LoraModel
    frozen: set[str] = field(default_factory=set)  # adapters whose LoRA part is not trained
    reft_frozen: set[str] = field(default_factory=set)  # adapters whose ReFT part is not trained

    def layers(self) -> list[Any]:
        return [module for module in self.tuner.model.modules() if isinstance(module, LoraLayer)]


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of LoRA layers but those of the layers they wrap."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [p for layer in layers for name, p in layer.named_parameters() if not name.startswith("base_layer.")]


def lora_of(model: nn.Module) -> Lora | None:
    """What is known of the LoRA layers of this base model; None if it has none of ours."""
    return model.__dict__.get(RECORD)


def paths(model: nn.Module) -> list[str]:
    """Paths of the LoRA layers, with what they keep adapters in."""
    record = lora_of(model)
    layers = model.named_modules() if record is not None else ()
    return [
        ".".join((path, "base_layer", *layer.adapter_layer_names))
        for path, layer in layers
        if isinstance(layer, LoraLayer)
    ]


def read_config(lora: Any) -> LoraConfig:
    """The `LoraConfig` of a ReftConfig's `lora`. ValueError for what could not be saved and loaded with the adapter."""
    if not isinstance(lora, dict):
        raise ValueError(f"lora must be a peft.LoraConfig or its dict, but is {lora!r}.")
    config = PeftConfig.from_peft_type(**LoraConfig.check_kwargs(**lora))
    if type(config) is not LoraConfig:
        raise ValueError(f"lora must be a peft.LoraConfig, but its peft_type is {lora.get('peft_type')!r}.")
    unfit = {
        "bias": (config.bias != "none", 'use bias="none"'),
        "modules_to_save": (bool(config.modules_to_save), "name them in the ReftConfig"),
        "trainable_token_indices": (config.trainable_token_indices is not None, "leave them out"),
        "init_lora_weights": (config.init_lora_weights not in _STARTS, "it changes the base's weights; use True"),
    }
    for name, (wrong, what) in unfit.items():
        if wrong:
            raise ValueError(f"A LoRA part of a ReFT adapter cannot have {name}={getattr(config, name)!r}: {what}.")
    return config


def add(
    model: nn.Module, adapter_name: str, config: ReftConfig, active: Iterable[str], configs: dict[str, Any]
) -> None:
    """Put the LoRA part of a new ReFT adapter into the base model, unless it is there (see `unwrap`). It acts if the
    adapter is among the active ones."""
    if config.lora is None:
        return
    record = lora_of(model)
    if record is not None and adapter_name in record.tuner.peft_config:
        return
    lora_config = read_config(config.lora)
    lora_config.inference_mode = config.inference_mode
    trains = [(p, p.requires_grad) for m in model.modules() if isinstance(m, ReftLayer) for p in m.parameters()]
    ours = model.__dict__.pop("peft_config", None)  # else LoraModel would write into ReFT's configs
    try:
        if record is None:
            record = Lora(LoraModel(model, {adapter_name: lora_config}, adapter_name))
        else:
            record.tuner.peft_config[adapter_name] = lora_config
            record.tuner.active_adapter = adapter_name  # with none PEFT fails on modules_to_save; put right below
            record.tuner.inject_adapter(model, adapter_name)
        record.tuner._cast_adapter_dtype(adapter_name, True)
    except Exception:
        _restore(model, ours, trains)
        raise
    _restore(model, ours, trains)
    model.__dict__[RECORD] = record
    if list(active) != [adapter_name]:
        activate(model, active, configs)
    check_sites(model)


def _restore(model: nn.Module, ours: Any, trains: list[tuple[nn.Parameter, bool]]) -> None:
    model.__dict__.pop("peft_config", None)
    if ours is not None:
        model.__dict__["peft_config"] = ours
    for parameter, requires_grad in trains:  # LoRA freezes everything else, ReFT adapters too
        parameter.requires_grad_(requires_grad)


def check_sites(model: nn.Module, paths: Iterable[str] = ()) -> None:
    """ValueError if one module has LoRA and is a site too: of an adapter that is there, or one of `paths`."""
    paths = set(paths)
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if name in paths or any(isinstance(child, ReftLayer) for child in module.modules()):
            raise ValueError(
                f"'{name}' has a LoRA adapter and is edited by ReFT as well, which would tie their names together: "
                "edit the module around it, or leave it out of LoRA's target_modules."
            )


def remove(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter's LoRA part away; with the last one the base's own layers come back."""
    record = lora_of(model)
    if record is None or adapter_name not in record.tuner.peft_config:
        return
    if len(record.tuner.peft_config) == 1:
        unload(model)
        return
    del record.tuner.peft_config[adapter_name]
    for layer in record.layers():
        layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
        layer.delete_adapter(adapter_name)
    record.frozen.discard(adapter_name)
    record.reft_frozen.discard(adapter_name)


def unload(model: nn.Module) -> None:
    """Give the base its own layers back."""
    record = lora_of(model)
    if record is None:
        return
    kept = model.__dict__.pop("peft_config", None)
    record.tuner._unload_and_optionally_merge(merge=False, progressbar=False)
    del model.__dict__[RECORD]
    if kept is not None:
        model.__dict__["peft_config"] = kept


def activate(model: nn.Module, names: Iterable[str], configs: dict[str, Any], inference_mode: bool = False) -> None:
    """Make the LoRA parts of these adapters the active ones, and train what is to be trained of them."""
    record = lora_of(model)
    if record is None:
        return
    names = [name for name in names if name in record.tuner.peft_config]
    record.tuner.active_adapter = names
    for layer in record.layers():
        layer.set_adapter(names, inference_mode=inference_mode)
        for name in names:
            config = configs.get(name)
            if name in record.frozen or (config is not None and config.inference_mode):
                _train(layer, name, False)
    for reft in model.__dict__[ATTRIBUTE].layers if ATTRIBUTE in model.__dict__ else ():
        for name in record.reft_frozen & set(names):
            for intervention in reft.interventions(name):
                intervention.requires_grad_(False)


def _train(layer: BaseTunerLayer, adapter_name: str, trains: bool) -> None:
    layer.set_requires_grad(adapter_name, trains)


def train_parts(model: nn.Module, parts: str, names: Iterable[str], configs: dict[str, Any]) -> None:
    """Train the "lora" part, the "reft" part or "both" of these adapters, from now on."""
    record = lora_of(model)
    if parts not in ("lora", "reft", "both"):
        raise ValueError(f'parts must be "lora", "reft" or "both", but is {parts!r}.')
    for name in names:
        if record is None or name not in record.tuner.peft_config:
            raise ValueError(f"Adapter {name!r} has no LoRA part.")
        for frozen, part in ((record.frozen, "lora"), (record.reft_frozen, "reft")):
            (frozen.discard if parts in (part, "both") else frozen.add)(name)
        for reft in model.__dict__[ATTRIBUTE].layers:
            for intervention in reft.interventions(name):
                intervention.requires_grad_(name not in record.reft_frozen)
    activate(model, record.tuner.active_adapters if record else (), configs)


def without_lora(model: nn.Module) -> AbstractContextManager[None]:
    """LoRA off, ReFT as it is."""
    return _set(model, "_disable_adapters", True)


def only_lora_of(model: nn.Module, names: Iterable[str]) -> AbstractContextManager[None]:
    """The LoRA parts of these adapters act, where they have one, whichever adapters are active."""
    return _set(model, "_active_adapter", list(names))


@contextmanager
def _set(model: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    """An attribute of every LoRA layer, for a while."""
    record = lora_of(model)
    layers = record.layers() if record is not None else []
    before = [getattr(layer, attribute) for layer in layers]
    for layer in layers:
        setattr(layer, attribute, value)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            setattr(layer, attribute, old)


@contextmanager
def without_reft(model: nn.Module) -> Iterator[None]:
    """ReFT off, LoRA as it is."""
    session = model.__dict__[ATTRIBUTE]
    before, session.enabled = session.enabled, False
    try:
        yield
    finally:
        session.enabled = before


def check_not_mixed(model: nn.Module, names: Iterable[str]) -> None:
    """A LoRA part acts on whole batches: ValueError if rows choose among adapters that have one, or beside one that
    is active."""
    record = lora_of(model)
    mixed = sorted(set(names) & set(record.tuner.peft_config)) if record is not None else []
    if mixed:
        raise ValueError(
            f"Adapter {mixed[0]!r} has a LoRA part, which acts on whole batches: it cannot be chosen by row. Use "
            "set_adapter."
        )
    for name in _acting(record):
        raise ValueError(
            f"The active adapter {name!r} has a LoRA part, which acts on whole batches, so on rows of other adapters "
            "too: make one without a LoRA part the active adapter first, or use model.disable_lora()."
        )


def check_composed(model: nn.Module, names: Iterable[str]) -> None:
    """A LoRA part acts if its adapter is active: ValueError if that differs from being among those composed (with LoRA
    switched off, none acts)."""
    record = lora_of(model)
    acting, names = set(_acting(record)), set(names)
    if record is None or all(layer.disable_adapters for layer in record.layers()):
        return
    for name in sorted(names & set(record.tuner.peft_config) - acting):
        raise ValueError(
            f"Adapter {name!r} has a LoRA part, which acts with the active adapters alone: make it the active adapter "
            f"first, model.set_adapter({name!r})."
        )
    for name in sorted(acting - names):
        raise ValueError(
            f"The active adapter {name!r} has a LoRA part, which would act beside the composition: make one of its "
            "adapters the active one first, model.set_adapter(...)."
        )


def _acting(record: Lora | None) -> list[str]:
    """The adapters whose LoRA part acts: they are active, and LoRA is not switched off."""
    layers = record.layers() if record is not None else []
    return sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})


def check_keys(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Refuse weights that do not hold exactly the LoRA part of the adapter."""
    record = next((r for m in model.modules() if (r := lora_of(m)) is not None), None)
    has_part = record is not None and adapter_name in record.tuner.peft_config
    expected = {
        f"{name}.{key}": value.shape
        for name, module in (record.tuner.model.named_modules() if record is not None and has_part else ())
        if isinstance(module, LoraLayer)
        for key, value in module.state_dict().items()
        if not key.startswith("base_layer.") and f".{adapter_name}" in f".{key}"
    }
    ours = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")  # an adapter may be called lora_something, too
    found = {k.removeprefix("base_model.model."): v.shape for k, v in state.items() if ours.search(k)}
    wrong = sorted(set(expected) ^ set(found)) or sorted(k for k in expected if expected[k] != found[k])
    if wrong:
        raise ValueError(
            f"The LoRA part of adapter {adapter_name!r} does not fit: {len(wrong)} tensors differ in name or shape, "
            f"such as {wrong[0]}. Load the directory that save_pretrained wrote, onto the base model it names."
        )
