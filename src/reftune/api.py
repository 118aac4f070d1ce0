"""The two lines: `get_reft_model(model, ReftConfig(...))`."""

from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from .tuner import ReftConfig, ReftModel
from .tuner.on_lora import get_quietly, unwrap


def get_reft_model(
    model: nn.Module, reft_config: ReftConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """`peft.get_peft_model` under pyreft's name: freezes the model, attaches the adapter, returns a `PeftModel`.

    `model` may be a `PeftModel` with a LoRA adapter: ReFT then goes on top of it, the LoRA adapter becomes part of the
    ReFT adapter (trained on if it was trainable, saved with it), and the given PeftModel is done with.

    Raises TypeError if `reft_config` is not a `ReftConfig`, and what `get_peft_model` raises.
    """
    if not isinstance(reft_config, ReftConfig):
        raise TypeError(f"get_reft_model takes a reftune.ReftConfig, but got a {type(reft_config).__name__}.")
    kwargs.pop("set_device", None)  # pyreft's arguments; the adapter goes where the model is
    kwargs.pop("disable_model_grads", None)
    if isinstance(model, PeftModel) and not isinstance(model.base_model, ReftModel):
        base, reft_config = unwrap(model, adapter_name, reft_config)
        return get_quietly(base, reft_config, adapter_name, **kwargs)
    peft_model: PeftModel = get_peft_model(model, reft_config, adapter_name=adapter_name, **kwargs)
    return peft_model
