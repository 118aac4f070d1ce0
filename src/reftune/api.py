"""The two lines: `get_reft_model(model, ReftConfig(...))`."""

from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from .tuner import ReftConfig


def get_reft_model(
    model: nn.Module, reft_config: ReftConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """`peft.get_peft_model` under pyreft's name: freezes the model, attaches the adapter, returns a `PeftModel`.

    Raises TypeError if `reft_config` is not a `ReftConfig`, and what `get_peft_model` raises.
    """
    if not isinstance(reft_config, ReftConfig):
        raise TypeError(f"get_reft_model takes a reftune.ReftConfig, but got a {type(reft_config).__name__}.")
    kwargs.pop("set_device", None)  # pyreft's arguments; the adapter goes where the model is
    kwargs.pop("disable_model_grads", None)
    peft_model: PeftModel = get_peft_model(model, reft_config, adapter_name=adapter_name, **kwargs)
    return peft_model
