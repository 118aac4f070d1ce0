"""`PeftModel.load_adapter` under a name that is there: PEFT then reads the weights alone, and no config."""

import contextlib
import os
from typing import Any

from peft import PeftModel

from .config import ReftConfig
from .registration import PEFT_TYPE, replace_method

_FORMULA = ("intervention", "act_fn", "between", "intervention_kwargs")  # the names of tensors tell the rest


def check_reloads() -> None:
    """Let it refuse weights whose config has another formula: DiReFT's R, W and b would be taken for LoReFT's."""
    replace_method(PeftModel, "load_adapter", _checked)


def _checked(original: Any) -> Any:
    def load_adapter(
        self: PeftModel, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        if self.peft_type == PEFT_TYPE and adapter_name in self.peft_config:
            _check(self, model_id, adapter_name, self._split_kwargs(kwargs)[0])
        return original(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


def _check(model: PeftModel, model_id: str | os.PathLike[str], adapter_name: str, where: dict[str, Any]) -> None:
    if adapter_name in model.base_model.session.unloaded:  # made from this very config
        return
    config = None
    with contextlib.suppress(ValueError, OSError, TypeError):  # weights alone, or another method's: PEFT, or their keys
        config = ReftConfig.from_pretrained(str(model_id), **where)
    here = model.peft_config[adapter_name]
    if isinstance(config, ReftConfig) and _formulas(config) != _formulas(here):
        raise ValueError(
            f"The adapter {adapter_name!r} here is {_formulas(here)}, but that in {model_id} is {_formulas(config)}: "
            "under a name that is there already the weights alone are loaded. Give it another name, or call "
            f"delete_adapter({adapter_name!r}) first."
        )


def _formulas(config: ReftConfig) -> str:
    """The formulas of an adapter's edits, each once, in words that can be compared."""
    found = {
        " ".join(str(edit[key]) if key == "intervention" else f"{key}={edit[key]!r}" for key in _FORMULA if edit[key])
        for edit in config.edits()
    }
    alpha = (config.lora or {}).get("lora_alpha")
    return ", ".join(sorted(found)) + (f" with LoRA of lora_alpha={alpha}" if alpha else "")
