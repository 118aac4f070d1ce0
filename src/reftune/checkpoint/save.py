"""`PeftModel.save_pretrained` and `push_to_hub` for ReFT adapters: atomic, with a model card of our own.

PEFT builds the PeftModel itself, so its method is the only place where a save can be made whole; models with adapters
of other kinds go straight through.
"""

import functools
import inspect
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from ..models import BUNDLED
from ..tuner import ReftConfig, ReftLayer
from ..tuner.atomic import PICKLED, WEIGHTS, commit_config, save_atomically
from ..tuner.counting import own_numbers
from .card import model_card

MARK = "<!-- reftune -->"
_BLANK = "This model card has been automatically generated."  # transformers' template, which tells nothing


def install() -> None:
    """Wrap PeftModel.save_pretrained, once."""
    original = PeftModel.save_pretrained
    if getattr(original, "_reftune", False):
        return

    names = list(inspect.signature(original).parameters)[2:]  # of what may follow the directory

    @functools.wraps(original)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        adapters = given.get("selected_adapters") or list(self.peft_config)
        main = given.get("is_main_process", True)
        if _only_here(self) and "save_embedding_layers" not in given:
            kwargs["save_embedding_layers"] = False  # PEFT would look the base up on the hub
        if not main or not all(isinstance(self.peft_config.get(name), ReftConfig) for name in adapters):
            return original(self, save_directory, *args, **kwargs)
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")

        pickled: list[str] = []  # adapters saved with safe_serialization=False

        def write(directory: str) -> None:
            original(self, directory, *args, **kwargs)
            pickled.extend(name for name in adapters if (_place(Path(directory), name) / PICKLED).is_file())
            (Path(directory) / "README.md").unlink(missing_ok=True)
            for name in adapters:
                commit_config(_place(Path(directory), name))
                _write_card(self, name, Path(directory), Path(save_directory))

        save_atomically(save_directory, write)
        for name in pickled:  # PEFT reads safetensors first, so an older file would be loaded
            (_place(Path(save_directory), name) / WEIGHTS).unlink(missing_ok=True)
        return None

    upload = PeftModel._upload_modified_files

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.peft_config.get("default"), ReftConfig):
            _restore_card(self, Path(working_dir))
        return upload(self, working_dir, *args, **kwargs)

    save_pretrained._reftune = True  # type: ignore[attr-defined]
    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
    PeftModel._upload_modified_files = _upload_modified_files  # type: ignore[method-assign]


def _restore_card(model: PeftModel, directory: Path) -> None:
    """`push_to_hub` puts a card over ours before the upload: the hub's, where there is one, or a blank one with the
    tags it was given. Those are kept."""
    tags = ModelCard.load(directory / "README.md").data.tags or []
    _write_card(model, "default", directory, directory)
    card = ModelCard.load(directory / "README.md")
    new = [tag for tag in tags if tag not in card.data.tags and tag != "transformers"]
    if new and MARK in card.content:
        card.data.tags += new
        card.save(directory / "README.md")


def _only_here(model: PeftModel) -> bool:
    """Whether the base is a file or the bundled one, which the hub does not know by that name."""
    name = str(getattr(model.get_base_model(), "name_or_path", ""))
    return name == BUNDLED or name.endswith(".gguf")


def _place(directory: Path, adapter_name: str) -> Path:
    """Where PEFT saves an adapter: the default one in the directory itself, others in one of their name."""
    return directory if adapter_name == "default" else directory / adapter_name


def _write_card(model: PeftModel, adapter_name: str, directory: Path, target: Path) -> None:
    """The card of one adapter; one that a person has rewritten (no mark) stays theirs."""
    old = _place(target, adapter_name) / "README.md"
    if old.exists() and not any(mark in old.read_text(encoding="utf-8") for mark in (MARK, _BLANK)):
        return
    base = model.get_base_model()
    sites, parameters = [], 0
    for path, layer in base.named_modules():
        if isinstance(layer, ReftLayer) and adapter_name in layer.groups:
            sites.append(path.replace(".edit_", "."))
            parameters += own_numbers(layer.interventions(adapter_name))
    directory = _place(directory, adapter_name)
    weights = directory / WEIGHTS
    card = model_card(
        config=model.peft_config[adapter_name],
        sites=sites,
        parameters=parameters,
        nbytes=weights.stat().st_size if weights.exists() else parameters * 4,
        base_class=type(base).__name__,
        reads=str(getattr(base, "main_input_name", "input_ids")),
    )
    (directory / "README.md").write_text(f"{card.rstrip()}\n\n{MARK}\n", encoding="utf-8")
