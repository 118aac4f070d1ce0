"""What will be edited, in this batch: the positions of a model's adapter, resolved without running it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..positions import check_prompts, parse, select_group
from .batch import Inputs, Prompt
from .layer import ReftLayer


@dataclass(frozen=True)
class Edit:
    """The edits of one intervention in one row."""

    site: str  # path of the module, with ".output" or ".input"
    layer: int | None
    group: str  # the terms that share the intervention, such as "f2"
    columns: tuple[int, ...]  # columns of the row that it edits, padding counted


def explain_tokens(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    prompt_columns: int | None = None,
    adapter_name: str | None = None,
) -> list[list[Edit]]:
    """The edits of each row of a batch, in the order in which the model makes them.

    Args:
        model: a PeftModel with a ReFT adapter.
        input_ids, attention_mask, labels, position_ids: (B, L), as the model would get them.
        prompt_columns: how many columns are the prompt, where the batch holds generated tokens too (as in `generate`).
        adapter_name: those that act if None, the active ones or the composition that is on.

    The decoder of an encoder-decoder reads the generated tokens alone, its encoder the prompt.
    """
    session = model.base_model.session
    names = [adapter_name] if adapter_name else session.names if session.enabled else []
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"There is no adapter {name!r}; this model has {sorted(model.peft_config)}.")
    rows, columns = input_ids.shape
    inputs = Inputs((rows, columns), attention_mask, labels, None, position_ids, device=input_ids.device)
    places = inputs.layout(None if prompt_columns is None else Prompt(prompt_columns))
    two_stacks = getattr(getattr(model.get_base_model(), "config", None), "is_encoder_decoder", False)
    edits: list[list[Edit]] = [[] for _ in range(rows)]
    for path, layer in model.get_base_model().named_modules():
        if not isinstance(layer, ReftLayer):
            continue
        for positions, group in (part for name in names for part in layer.groups.get(name, ())):
            if labels is not None:
                check_prompts(places, parse(positions))
            tokens = select_group(parse(group), places, parse(positions))
            if two_stacks:
                tokens = tokens & ((places.generated >= 0) == ("decoder" in path.split(".")))
            for row in range(rows):
                found = tuple(torch.nonzero(tokens[row]).flatten().tolist())
                edits[row].append(Edit(path.replace(".edit_", "."), _layer_number(path), group, found))
    return edits


def _layer_number(path: str) -> int | None:
    numbers: Sequence[str] = [part for part in path.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None
