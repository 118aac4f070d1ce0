"""A composition as a directory to share: "this style plus half of that tone".

    save_composition(model, style + 0.5 * tone, "runs/mine")
    model = load_composition(base, "runs/mine")          # the adapters loaded and the composition on
    model, tokenizer = load_composed("runs/mine")        # with the base model that it names

    runs/mine/composition.json                           # strengths, how, base; written last, so it is the commit
    runs/mine/style/adapter_config.json, adapter_model.safetensors, README.md
    runs/mine/tone/...

A save that is cut off leaves the composition that was there before: changed adapters go into new folders, and
`composition.json`, which names the folders, is replaced in one step.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..tuner.atomic import CONFIG, WEIGHTS, staging
from ..tuner.compatibility import base_shape, check_same
from .algebra import Composition

FILE = "composition.json"
_VERSION = 1


@dataclass(frozen=True)
class SavedComposition:
    """What `composition.json` says. folders: adapter name → its folder in the directory."""

    composition: Composition
    folders: Mapping[str, str]
    base_model: str | None
    base_shape: Mapping[str, Any]


def save_composition(model: Any, composition: Composition, directory: str | os.PathLike[str]) -> None:
    """Save the adapters of a composition, as PEFT saves each, and its strengths beside them.

    Raises ValueError for adapters that the model does not have, and for an empty composition; then nothing is written.
    """
    tuner = composition._fits(model)
    if not isinstance(model, PeftModel):
        raise TypeError(f"save_composition takes the PeftModel, but got a {type(model).__name__}.")
    if not composition.strengths:
        raise ValueError("This composition has no adapter, so there is nothing to save.")
    target = Path(directory)
    if target.is_file():
        raise ValueError(f"{target} is a file; give a directory.")
    for name in composition.strengths:
        if Path(name).name != name or name in (".", "..") or name.startswith("."):
            raise ValueError(f"Adapter {name!r} cannot be the name of a folder: load it under a plain name.")
    before = _folders_before(target)
    with staging(target) as temporary:
        folders = {}
        for name in composition.strengths:
            written = _save_adapter(model, name, temporary / name)
            folders[name] = _move_in(written, target, name)
        first = tuner.peft_config[next(iter(composition.strengths))]
        content = {
            "version": _VERSION,
            "how": composition.how,
            "adapters": [
                {"name": name, "strength": strength, "folder": folders[name]}
                for name, strength in composition.strengths.items()
            ],
            "base_model_name_or_path": first.base_model_name_or_path,
            "base_model_shape": base_shape(tuner.model),
        }
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        _write(temporary / FILE, text)
        os.replace(temporary / FILE, target / FILE)
    for folder in before - set(folders.values()):
        shutil.rmtree(target / folder, ignore_errors=True)


def _folders_before(target: Path) -> set[str]:
    try:
        return set(read_composition(target).folders.values())
    except (FileNotFoundError, ValueError):  # none, or none that could be loaded: what lies there is left alone
        return set()


def _save_adapter(model: PeftModel, name: str, place: Path) -> Path:
    """The folder that holds the adapter: PEFT puts one that is not called "default" into a folder of its name."""
    model.save_pretrained(str(place), selected_adapters=[name])
    return place if (place / CONFIG).is_file() else place / name


def _move_in(written: Path, target: Path, name: str) -> str:
    """Move an adapter's folder to the target; beside the old one, under another name, if that differs."""
    digest = _digest(written)
    for folder in (name, f"{name}-{digest[:12]}"):
        place = target / folder
        if not place.exists():
            os.rename(written, place)
            return folder
        with contextlib.suppress(OSError, SafetensorError):  # whatever else lies there
            if _digest(place) == digest:
                return folder
    raise ValueError(f"{target / folder} is in the way: it is not an adapter that was saved here. Move it away.")


def _digest(folder: Path) -> str:
    """Of an adapter's config and tensors; the bytes of two equal safetensors files may differ."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for name, tensor in sorted(load_file(folder / WEIGHTS).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def is_composition(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a saved composition."""
    return (Path(directory) / FILE).is_file()


def read_composition(directory: str | os.PathLike[str]) -> SavedComposition:
    """What a directory's `composition.json` says; FileNotFoundError or ValueError where it does not say it."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"No composition here: {Path(directory)} has no {FILE}. `save_composition` writes one.")

    def wrong(why: str) -> ValueError:
        return ValueError(f"{path} is no composition that save_composition wrote: {why}.")

    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise wrong(f"it is not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("adapters"), list) or not content["adapters"]:
        raise wrong("it lists no adapters")
    if content.get("version") != _VERSION:
        raise wrong(f"it has version {content.get('version')!r}, and this reftune reads version {_VERSION}")
    strengths: dict[str, Any] = {}
    folders: dict[str, str] = {}
    for entry in content["adapters"]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("name", "folder")):
            raise wrong(f"an adapter must have a name, a strength and a folder, but one is {entry!r}")
        name, folder = entry["name"], entry["folder"]
        if name in strengths:
            raise wrong(f"adapter {name!r} comes twice")
        if Path(folder).name != folder or folder in ("", ".", ".."):
            raise wrong(f"the folder {folder!r} of adapter {name!r} is not a plain name")
        strengths[name], folders[name] = entry.get("strength"), folder
    try:
        how: Any = content.get("how")
        composition = Composition(strengths, how)
    except ValueError as error:
        raise wrong(str(error).rstrip(".")) from None
    for folder in folders.values():
        for file in (CONFIG, WEIGHTS):
            if not (Path(directory) / folder / file).is_file():
                raise FileNotFoundError(f"The composition in {directory} is incomplete: {folder}/{file} is missing.")
    base, shape = content.get("base_model_name_or_path"), content.get("base_model_shape")
    return SavedComposition(
        composition, folders, base if isinstance(base, str) else None, shape if isinstance(shape, dict) else {}
    )


def load_composition(base: nn.Module, directory: str | os.PathLike[str]) -> PeftModel:
    """Load the adapters of a saved composition onto a base model, or onto a PeftModel beside its own, and turn it on.

    `Composition.remove(model)` turns it off again, `reftune.current(model)` says what is on.

    Raises FileNotFoundError or ValueError, with the base as it was, for a directory without a composition, a base of
    another shape, and names that a PeftModel has already.
    """
    saved = read_composition(directory)
    inner = base.get_base_model() if isinstance(base, PeftModel) else base
    check_same(dict(saved.base_shape), base_shape(inner), " + ".join(saved.folders))
    if isinstance(base, PeftModel):
        taken = [name for name in saved.folders if name in base.peft_config]
        if taken:
            raise ValueError(
                f"This model has an adapter {taken[0]!r} already: delete it before loading the composition."
            )
    model: Any = base if isinstance(base, PeftModel) else None
    active = list(base.active_adapters) if isinstance(base, PeftModel) else []
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    loaded: list[str] = []
    try:
        for name, folder in saved.folders.items():
            path = str(Path(directory) / folder)
            if model is None:
                model = PeftModel.from_pretrained(base, path, adapter_name=name)
            else:
                model.load_adapter(path, adapter_name=name)
            loaded.append(name)
        acting = {name: model.peft_config[name] for name in saved.composition.mix.active()}
        whole = [name for name, c in acting.items() if c.beside_edits() or getattr(c, "lora", None)]
        if not whole and not isinstance(base, PeftModel):
            whole = list(acting)[:1]  # not one with the strength 0, whose LoRA part would act
        if whole:  # these act with the active adapters alone, and the first that was loaded is active
            model.set_adapter(whole, inference_mode=True)
        saved.composition.apply(model)
    except Exception:
        if isinstance(base, PeftModel):
            if list(base.active_adapters) != active:
                base.set_adapter(active, inference_mode=frozen)
            for name in loaded:
                base.delete_adapter(name)
        elif model is not None:
            model.unload()
        raise
    return model


def load_composed(
    directory: str | os.PathLike[str], *, dtype: Any = None, device_map: Any = None, **kwargs: Any
) -> Any:
    """A saved composition on the base model that it names: (PeftModel, tokenizer). Arguments as of `load_adapted`."""
    from ..models import load_model

    saved = read_composition(directory)
    if not saved.base_model:
        raise ValueError(
            f"The composition in {directory} does not name its base model. Load the base with load_model and use "
            "load_composition."
        )
    base, tokenizer = load_model(saved.base_model, dtype=dtype, device_map=device_map, **kwargs)
    return load_composition(base, directory), tokenizer
