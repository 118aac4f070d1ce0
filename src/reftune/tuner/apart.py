"""The two parts of a ReFT adapter with LoRA, saved and loaded apart.

save_lora(model, "runs/lora")        # a plain PEFT LoRA adapter: loads without reftune
save_reft(model, "runs/reft")        # ReFT alone
lora = PeftModel.from_pretrained(base, "runs/lora")
model = load_on_lora(lora, "runs/reft")
"""

import copy
import os
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor

from .atomic import WEIGHTS, commit_config, save_atomically
from .config import ReftConfig
from .on_lora import get_quietly, unwrap
from .with_lora import lora_of


def save_lora(model: PeftModel, save_directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Write the LoRA part of an adapter (the active one if None) as PEFT itself would: config and weights.

    ValueError if the adapter has none.
    """
    name = _with_part(model, adapter_name)
    record = lora_of(model.get_base_model())
    assert record is not None
    config = copy.copy(record.tuner.peft_config[name])
    config.inference_mode = True
    config.base_model_name_or_path = model.peft_config[name].base_model_name_or_path
    config.task_type = model.peft_config[name].task_type
    tensors = {key: value for key, value in _tensors(model, name).items() if ".reft_" not in key}
    if config.use_dora:
        ending = "lora_magnitude_vector.weight"
        tensors = {k.removesuffix(".weight") if k.endswith(ending) else k: v for k, v in tensors.items()}

    def write(directory: str) -> None:
        config.save_pretrained(directory)
        save_file(tensors, Path(directory) / WEIGHTS, metadata={"format": "pt"})

    save_atomically(save_directory, write)


def save_reft(model: PeftModel, save_directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Write an adapter (the active one if None) without its LoRA part, to be loaded on that LoRA with `load_on_lora`.

    ValueError if the adapter has no LoRA part: then `save_pretrained` is the call.
    """
    name = _with_part(model, adapter_name)
    tensors = {key: value for key, value in _tensors(model, name).items() if ".lora_" not in key}
    config = copy.copy(model.peft_config[name])
    config.lora, config.inference_mode = None, True

    def write(directory: str) -> None:
        config.save_pretrained(directory)
        save_file(tensors, Path(directory) / WEIGHTS, metadata={"format": "pt"})
        commit_config(Path(directory))

    save_atomically(save_directory, write)


def load_on_lora(
    lora_model: PeftModel, model_id: str, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """A ReFT adapter that `save_reft` wrote, on a PeftModel with the LoRA adapter that it was trained with.

    Returns the PeftModel of both; the given one is done with. Raises what `get_reft_model` raises for such a model, and
    ValueError if the weights do not fit.
    """
    config = ReftConfig.from_pretrained(model_id)
    config.inference_mode = not is_trainable
    base, config = unwrap(lora_model, adapter_name, config)
    model = get_quietly(base, config, adapter_name)
    state = load_peft_weights(model_id, device="cpu")
    own = {key: value.cpu() for key, value in _tensors(model, adapter_name).items() if ".lora_" in key}
    set_peft_model_state_dict(model, {**own, **state}, adapter_name=adapter_name)
    return model if is_trainable else model.eval()


def _tensors(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    state: dict[str, Any] = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def _with_part(model: PeftModel, adapter_name: str | None) -> str:
    active = model.active_adapter
    name: str = adapter_name or (active if isinstance(active, str) else active[0])
    record = lora_of(model.get_base_model())
    if record is None or name not in record.tuner.peft_config:
        raise ValueError(f"Adapter {name!r} has no LoRA part to save apart: use model.save_pretrained.")
    return name
