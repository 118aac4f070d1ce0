"""Brute force: what an adapter should do, stated without reftune's positions, hooks or sessions.

One unpadded row at a time, no cache, the whole sequence again for every new token, and explicit lists of columns.
"""

import torch
from torch import Tensor, nn

from reftune.tuner.layer import ReftLayer


def columns(expression: str, prompt: int, total: int) -> dict[str, list[int]]:
    """Columns that each term edits in a sequence of `total` tokens, the first `prompt` of which are the prompt."""
    numbers = {part[0]: int(part[1:]) for part in expression.split("+") if part[0] in "fl" and part[1:].isdigit()}
    first, last = numbers.get("f", 0), numbers.get("l", 0)
    if prompt < first + last:
        first, last = min(first, prompt // 2), min(last, (prompt + 1) // 2)
    found: dict[str, list[int]] = {}
    for part in expression.split("+"):
        if part == "prompt":
            here = range(prompt)
        elif part == "all":
            here = range(total)
        elif part == "gen":
            here = range(prompt, total)
        elif part.startswith("gen:"):
            here = range(prompt, min(total, prompt + int(part[4:])))
        elif part.startswith("gen/"):
            here = range(prompt + int(part[4:]) - 1, total, int(part[4:]))
        elif part.startswith("mid"):
            count = int(part[3:])
            start = max(prompt // 2 - count // 2, 0)
            here = range(start, min(start + count, prompt))
        elif part.startswith("f"):
            here = range(first)
        else:
            here = range(prompt - last, prompt)
        found[part] = list(here)
    return found


@torch.no_grad()
def logits(model: nn.Module, ids: list[int], prompt: int, adapter: str = "default") -> Tensor:
    """Logits (T, V) of one sequence, edited by hand: the adapter is off, plain hooks do its work."""
    base = model.get_base_model()
    layers = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, ReftLayer)]
    handles = []
    for name, layer in layers:
        owner = base.get_submodule(name.rpartition(".")[0])
        edits = []
        for positions, group in layer.groups.get(adapter, ()):
            where = columns(positions, prompt, len(ids))
            chosen = sorted({c for part in group.split("+") for c in where[part]})
            if chosen:
                edits.append((chosen, getattr(layer, f"reft_{group}")[adapter]))

        def edit(hidden: Tensor, edits=edits) -> Tensor:
            hidden = hidden.clone()
            for chosen, intervention in edits:
                hidden[0, chosen] = intervention(hidden[0, chosen])
            return hidden

        if name.endswith("edit_output"):

            def after(module, args, output, edit=edit):
                return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

            handles.append(owner.register_forward_hook(after))
        else:

            def before(module, args, kwargs, edit=edit):
                if args:
                    return (edit(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

            handles.append(owner.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with model.disable_adapter():
            return base(torch.tensor([ids], device=base.device), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def greedy(model: nn.Module, prompt: list[int], new: int) -> tuple[list[int], Tensor]:
    """The tokens that greedy decoding adds to a prompt, and the logits (new, V) they were chosen from."""
    ids, scores = list(prompt), []
    for _ in range(new):
        scores.append(logits(model, ids, len(prompt))[-1])
        ids.append(int(scores[-1].argmax()))
    return ids[len(prompt) :], torch.stack(scores)
