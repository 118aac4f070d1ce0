"""Models of real shapes without their weights (on torch's meta device), to count what a preset trains.

count_preset("paper/commonsense", "llama-7b")     # {"loreft": 2097408, ...}
"""

from typing import Any

from .grid import load_grid, resolved_methods
from .methods import Counts, attach
from .models import head_modules

_LLAMA = {
    "llama-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32},
    "llama-13b": {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824, "num_attention_heads": 40},
    "llama-3-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
_LLAMA["llama-2-7b"], _LLAMA["llama-2-13b"] = _LLAMA["llama-7b"], _LLAMA["llama-13b"]
_ROBERTA = {
    "roberta-base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
    },
    "roberta-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
    },
}
SHAPES = (*_LLAMA, *_ROBERTA)


def meta_model(shape: str) -> Any:
    """A model of that shape on the meta device: no memory, no weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        if shape in _LLAMA:
            return LlamaForCausalLM(LlamaConfig(**_LLAMA[shape]))
        if shape in _ROBERTA:
            sizes = _ROBERTA[shape] | {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
            return RobertaForSequenceClassification(RobertaConfig(**sizes))
    raise ValueError(f"There is no shape {shape!r}. Known: {', '.join(SHAPES)}.")


def count_preset(preset: str, shape: str) -> dict[str, Counts]:
    """What each method of a preset (or grid file) trains on a model of that shape."""
    found = {}
    for method in resolved_methods(load_grid(preset)):
        model = meta_model(shape)
        head = head_modules(model) if shape in _ROBERTA else []
        found[method.name] = attach(model, method, head=head, steps=100)[1]
    return found
