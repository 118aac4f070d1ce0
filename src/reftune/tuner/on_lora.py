"""ReFT on a PeftModel that has a LoRA adapter: its base, LoRA layers and all, becomes the base of a ReFT PeftModel."""

import copy
import warnings
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

from .config import ReftConfig, plain_config
from .with_lora import RECORD, Lora, lora_parameters, read_config


def get_quietly(model: nn.Module, config: ReftConfig, adapter_name: str, **kwargs: Any) -> PeftModel:
    """`get_peft_model` for a base with LoRA layers, without its warning that there is an adapter already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
        peft_model: PeftModel = get_peft_model(model, config, adapter_name=adapter_name, **kwargs)
    return peft_model


def unwrap(lora_model: PeftModel, adapter_name: str, config: ReftConfig) -> tuple[nn.Module, ReftConfig]:
    """A PeftModel with one LoRA adapter → its base with the LoRA layers in it, and the config of a ReFT adapter whose
    LoRA part that is. What LoRA trains stays trainable, what is frozen stays frozen. The PeftModel is done with.

    Raises TypeError for another method than LoRA, ValueError for several LoRA adapters or merged ones.
    """
    tuner: Any = lora_model.base_model
    if type(tuner) is not LoraModel:
        raise TypeError(f"ReFT can be put on a PeftModel with LoRA, but this one has a {type(tuner).__name__}.")
    names = list(tuner.peft_config)
    if len(names) != 1 or tuner.active_adapters != names:
        raise ValueError(
            f"The model has the LoRA adapters {names}, active: {tuner.active_adapters}. Keep the one that ReFT is to "
            "be trained on: lora_model.delete_adapter(...) the others."
        )
    base = lora_model.get_base_model()
    record = Lora(tuner)
    if any(layer.merged for layer in record.layers()):
        raise ValueError("The LoRA adapter is merged into the weights: call lora_model.unmerge_adapter() first.")
    if config.lora is not None:
        raise ValueError("The config has a lora of its own, and the model has one already: leave out one of them.")
    config = copy.copy(config)
    config.lora = plain_config(tuner.peft_config[names[0]])
    read_config(config.lora)
    if names[0] != adapter_name:
        _rename(record, names[0], adapter_name)
    if not any(p.requires_grad for p in lora_parameters(base)):
        record.frozen.add(adapter_name)
    base.__dict__.pop("peft_config", None)
    base.__dict__[RECORD] = record
    return base, config


def _rename(record: Lora, old: str, new: str) -> None:
    for layer in record.layers():
        for attribute in (
            *layer.adapter_layer_names,
            *layer.other_param_names,
            "lora_variant",
            "use_dora",
            "lora_bias",
        ):
            table: Any = getattr(layer, attribute, None)
            if hasattr(table, "keys") and old in table:
                value = table[old]
                del table[old]
                table[new] = value
        layer._active_adapter = [new]
    record.tuner.peft_config[new] = record.tuner.peft_config.pop(old)
    record.tuner.active_adapter = new
