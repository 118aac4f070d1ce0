"""What PEFT does not check: that an adapter fits the base it is put on, and that what is loaded is all of it."""

import re
from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..positions import parse
from ..sites import Site
from .layer import ReftLayer
from .session import ATTRIBUTE

OURS = re.compile(r"(^|\.)edit_(output|input)\.reft_")  # in the key of an intervention's tensor, before its group
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers")


def base_shape(model: nn.Module) -> dict[str, Any]:
    """Architecture, width and depth of a base model, as its config names them; {} for a model without a config."""
    config = getattr(model, "config", None)
    text = _text(config)
    shape = {key: getattr(text, key, None) for key in _SHAPE}
    shape["model_type"] = getattr(config, "model_type", None)
    return {key: value for key, value in shape.items() if isinstance(value, (int, str))}


def check_same(saved: dict[str, Any], found: dict[str, Any], adapter_name: str) -> None:
    """Refuse a base that differs from the one the adapter was trained on, naming both values."""
    wrong = [
        f"{key} {saved[key]!r} (this model: {found[key]!r})"
        for key in _SHAPE
        if key in saved and key in found and saved[key] != found[key]
    ]
    if wrong:
        raise ValueError(
            f"Adapter {adapter_name!r} does not fit this base model: it was trained on one with {', '.join(wrong)}. "
            "Load the base model that its adapter_config.json names in base_model_name_or_path."
        )


def check_new(model: nn.Module, adapter_name: str) -> None:
    """Refuse what a cell of a notebook does that runs twice: a second adapter under a name that the base has already,
    which would be one with the first, and a PeftModel for a base."""
    if isinstance(model, PeftModel):
        what, ours = type(model).__name__, ATTRIBUTE in model.get_base_model().__dict__
        do = "For ReFT on a LoRA adapter: reftune.get_reft_model(lora_model, config)."
        if ours:
            do = "Add to it by add_adapter(name, config) or load_adapter(path, name); unload() gives the base back."
        raise TypeError(f"The model is a {what} already, and PEFT keeps one method in each. {do}")
    session = model.__dict__.get(ATTRIBUTE)
    if session is not None and any(adapter_name in layer.groups for layer in session.layers):
        raise ValueError(
            f"The base model has a ReFT adapter {adapter_name!r} already. Give the new one another name "
            "(adapter_name=...) or take the old one away first: base = peft_model.unload(), or "
            "peft_model.delete_adapter(...)."
        )


def check_decoder(model: nn.Module, site: Site, positions: str) -> None:
    """The decoder of an encoder-decoder has no prompt: only "all" means something there."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    if "decoder" in site.path.split(".") and any(term.name != "all" for term in parse(positions)):
        raise ValueError(
            f"'{site}' lies in the decoder of an encoder-decoder, which has no prompt for positions={positions!r} to "
            "refer to: use positions='all' there, or edit the encoder."
        )


def site_width(model: nn.Module, target: nn.Module, site: Site) -> int | None:
    """d at a site: a linear layer says it; else the config of the innermost model around the module; else None."""
    size = getattr(target, "out_features" if site.where == "output" else "in_features", None)
    if isinstance(size, int):
        return size
    if type(target).__name__ == "Conv1D":
        return int(target.nf if site.where == "output" else target.nx)  # type: ignore[arg-type]
    parts = site.path.split(".")
    for end in range(len(parts), -1, -1):
        owner = model.get_submodule(".".join(parts[:end]))
        width = getattr(_text(getattr(owner, "config", None)), "hidden_size", None)
        if isinstance(width, int):
            return width
    return None


def _text(config: Any) -> Any:
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def with_orthonormal_rows(model: nn.Module, adapter_name: str, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict to save: gathered where it is sharded (by all processes together), and every R on orthonormal
    rows, because the optimiser touched them after the last forward."""
    state = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}
    for name, layer in _layers(model):
        for attribute, intervention in _of(layer, adapter_name):
            prefix = f"{name}.{attribute}.{adapter_name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            state |= {prefix + key: value for key, value in intervention.righted(own).items()}
    return state


def check_keys(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Refuse weights that are not exactly this adapter's; PEFT would warn and leave it the identity."""
    expected = {
        f"{name}.{attribute}.{adapter_name}.{key}".removeprefix("base_model.model."): value.shape
        for name, layer in _layers(model)
        for attribute, intervention in _of(layer, adapter_name)
        for key, value in intervention.state_dict().items()
    }
    found = {k.removeprefix("base_model.model."): v.shape for k, v in state.items() if OURS.search(k)}
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    shapes = [f"{k}: {tuple(found[k])} in the file, {tuple(expected[k])} here" for k in expected if k in found]
    shapes = [
        line for line, k in zip(shapes, [k for k in expected if k in found], strict=True) if found[k] != expected[k]
    ]
    if missing or extra or shapes:
        parts = [
            f"{len(names)} {what}, such as {names[0]}"
            for names, what in ((missing, "missing"), (extra, "not known to its config"), (shapes, "of another shape"))
            if names
        ]
        raise ValueError(
            f"The weights of adapter {adapter_name!r} do not fit its config and this base model: tensors "
            f"{'; '.join(parts)}. Load the directory that save_pretrained wrote, onto the base model it names."
        )


def as_made(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights to load, those for parameters without memory (`low_cpu_mem_usage`) as precise as these and where the
    base is: they are put in their place as they come, whatever the file holds and wherever PEFT read it to."""
    state, keys = dict(state), {key.removeprefix("base_model.model."): key for key in state}
    for name, layer in _layers(model):
        base = model.get_submodule(name.rpartition(".")[0]).parameters()
        device = next((p.device for p in base if not p.is_meta), None)
        for attribute, intervention in _of(layer, adapter_name):
            for part, there in intervention.state_dict().items():
                key = keys.get(f"{name}.{attribute}.{adapter_name}.{part}".removeprefix("base_model.model."))
                if there.is_meta and key is not None:
                    state[key] = state[key].to(device, there.dtype)
    return state


# what PEFT adds to modules_to_save by itself, for any classifier
_HEADS = {"classifier", "score", "qa_outputs"}


def check_saved_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a name in `modules_to_save` that no module has: PEFT would train nothing for it, without a word."""
    paths = [name for name, _ in model.named_modules()]
    for name in sorted(set(names) - _HEADS):
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            tops = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"modules_to_save names {name!r}, which no module of the model is called ({tops} ...).")


def check_names(adapter_name: str, sites: Iterable[str], lora: Iterable[str], others: Iterable[str]) -> None:
    """Refuse an adapter called like a module on the way to its sites: PEFT tells keys apart by the adapter's name. None
    of the `others` either may be called like one on the way to a LoRA part."""
    own = {"base_model", "model", "edit_output", "edit_input", *(part for path in sites for part in path.split("."))}
    of_lora = {part for path in lora for part in path.split(".")}
    for name in (adapter_name, *others):
        taken = own | of_lora if name == adapter_name else of_lora
        if name in taken:
            raise ValueError(
                f"An adapter cannot be called {name!r}, as a module of this model is: saving would mix them up. "
                f"Choose a name other than {', '.join(sorted(part for part in taken if not part.isdigit()))}."
            )


def with_all_tensors(model: nn.Module, adapter_name: str, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict with what PEFT left out of it: it drops keys that end in another adapter's name, such as "b"."""
    state = dict(state)
    for name, layer in _layers(model):
        for attribute, intervention in _of(layer, adapter_name):
            for key, value in intervention.state_dict().items():
                state.setdefault(f"{name}.{attribute}.{adapter_name}.{key}", value)
    return state


def edited_modules(model: nn.Module, adapter_name: str) -> list[str]:
    """Paths in the base model of the modules that an adapter edits, sorted."""
    paths = {name.rpartition(".")[0] for name, layer in _layers(model) if adapter_name in layer.groups}
    return sorted(path.removeprefix("base_model.model").removeprefix(".") for path in paths)


def _layers(model: nn.Module) -> list[tuple[str, ReftLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ReftLayer)]


def _of(layer: ReftLayer, adapter_name: str) -> list[tuple[str, Any]]:
    return [
        (a, getattr(layer, a)[adapter_name]) for a in layer.adapter_layer_names if adapter_name in getattr(layer, a)
    ]
