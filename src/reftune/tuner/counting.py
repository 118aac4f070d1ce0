"""How many numbers a model trains."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class TrainableParameters:
    """How much is trained: numbers, and out of how many in the model."""

    count: int
    total: int

    def __str__(self) -> str:
        return (
            f"{self.count:,} parameters, {self.count * 2 / 1000:,.1f} kB in bfloat16, "
            f"{100 * self.count / max(self.total, 1):.4f}% of the model"
        )


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Those of a model, shared ones once."""
    seen = {id(p): p for p in model.parameters()}.values()
    return TrainableParameters(sum(_numel(p) for p in seen if p.requires_grad), sum(_numel(p) for p in seen))


def own_numbers(interventions: Iterable[nn.Module]) -> int:
    """How many numbers interventions have, without the directions of others that they stay out of."""
    tensors = (item for module in interventions for item in module.state_dict().items())
    return sum(value.numel() for key, value in tensors if ".others_" not in f".{key}")


def _numel(parameter: nn.Parameter) -> int:
    count = parameter.numel() or getattr(parameter, "ds_numel", 0)
    if type(parameter).__name__ == "Params4bit":  # two weights a byte
        return int(count * 2 * getattr(parameter, "element_size", lambda: 1)())
    return int(count)
