"""Terms × layout → the tokens to edit."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .grammar import Term
from .layout import Layout


class NoPromptError(ValueError):
    """A batch in which some sequence has no prompt, though a term names prompt or generated tokens."""


def select(term: Term, places: Layout, expression: Iterable[Term]) -> Tensor:
    """The tokens of one term, (B, T) bool; `expression` is the whole it belongs to.

    Prompts shorter than prefix + suffix share out by the paper's rule: with n tokens, the prefix p becomes
    min(p, ⌊n/2⌋) and the suffix s min(s, ⌈n/2⌉) (Wu et al. 2024, section 4.1).
    """
    index, length = places.index, places.length
    prompt = index >= 0
    match term.name:
        case "f":
            return prompt & (index < _budget("f", expression, length))
        case "l":
            return prompt & (index >= length - _budget("l", expression, length))
        case "mid":
            first = (length // 2 - term.number // 2).clamp(min=0)
            return prompt & (index >= first) & (index < first + term.number)
        case "prompt":
            return prompt
        case "all":
            return prompt | (places.generated >= 0)
        case "gen":
            return places.generated >= 0
        case "gen:":
            return (places.generated >= 0) & (places.generated < term.number)
        case "gen/":
            return (places.generated >= 0) & ((places.generated + 1) % term.number == 0)


def _budget(name: str, expression: Iterable[Term], length: Tensor) -> Tensor:
    counts = {t.name: t.number for t in expression}
    first, last = counts.get("f", 0), counts.get("l", 0)
    short = length < first + last
    if name == "f":
        return torch.where(short, (length // 2).clamp(max=first), first)
    return torch.where(short, ((length + 1) // 2).clamp(max=last), last)


def select_group(group: Sequence[Term], places: Layout, expression: Sequence[Term]) -> Tensor:
    """The tokens of several terms that share one intervention, (B, T) bool: each token once."""
    chosen = select(group[0], places, expression)
    for term in group[1:]:
        chosen = chosen | select(term, places, expression)
    return chosen


def check_prompts(places: Layout, terms: Iterable[Term]) -> None:
    """Raise `NoPromptError` if a sequence starts with an answer while a term other than `all` is used."""
    if all(term.name == "all" for term in terms):
        return
    missing = (places.generated >= 0) & (places.length == 0)
    if torch.compiler.is_compiling():  # no look at values inside a graph; without compilation the error says more
        torch._assert_async(~missing.any(), "The labels of a row leave no prompt: its first token is labelled already.")
    elif bool(missing.any()):
        row = int(missing.any(dim=1).long().argmax())
        raise NoPromptError(
            f"The labels of row {row} leave no prompt: its first token is labelled already, so there is no prompt "
            f"for positions={'+'.join(map(str, terms))!r} to refer to. Set the labels of the prompt to -100 "
            "(TRL: a prompt-completion dataset, or assistant_only_loss=True), pass prompt_mask (1 on prompt tokens) "
            "to the model, or use positions='all'."
        )
