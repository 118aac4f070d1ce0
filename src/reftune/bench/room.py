"""How many tokens a model with a table of positions can read; what is longer would end in the table's IndexError.

room = positions(model)                        # GPT-2 1,024, OPT 2,048, RoBERTa 512; None where they are computed
prompts, cut = shortened(prompts, room, 32)    # the last tokens, as lm-evaluation-harness keeps them
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

_NAMES = ("position_embeddings", "embed_positions", "wpe", "position_embedding")


def positions(model: Any) -> int | None:
    """The tokens that a model has learned positions for; None for one that computes them (rotary, ALiBi)."""
    sizes = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _NAMES:
            # RoBERTa counts from behind its padding's id
            sizes.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    told = getattr(model.config, "max_position_embeddings", None)  # OPT's table has two rows more
    return min([*sizes, told] if told else sizes) if sizes else None


def shortened(prompts: Sequence[list[int]], room: int | None, answer: int) -> tuple[list[list[int]], int]:
    """Prompts that leave room for an answer of `answer` tokens, and how many lost their beginning.

    Raises ValueError where the answer itself leaves no room.
    """
    if room is None:
        return list(prompts), 0
    if room <= answer:
        raise ValueError(
            f"Answers of up to {answer} tokens leave no room for a prompt: the model has positions for {room}. "
            "Lower scoring.max_new_tokens, or take a model that reads more."
        )
    longest = room - answer
    return [ids[-longest:] for ids in prompts], sum(len(ids) > longest for ids in prompts)
