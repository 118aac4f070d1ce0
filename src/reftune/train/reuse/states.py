"""Hidden states below the first edited layer: computed once, handed in where the blocks would compute them again.

Blocks are skipped by putting another `forward` before their own while a pass runs. Their hooks stay: a skipped block
whose output is edited hands out the kept state, and the edit is made on it as ever. Masks, rotary embeddings and
everything else outside the blocks is the model's own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_NAMES = ("hidden_states", "x", "input", "inputs")


@contextmanager
def replaced(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """While it is open, each block runs the `forward` given for it."""
    before = [block.__dict__.get("forward") for block in blocks]  # accelerate keeps one of its own there
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.__dict__["forward"] = forward
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own


def skip_blocks(blocks: Sequence[nn.Module], state: Tensor | None = None, as_tuple: bool = False) -> Any:
    """Context in which the blocks hand on what they are given; the last of them hands out `state` (B, L, d) if given.

    as_tuple: these blocks return a tuple that begins with the hidden states.
    """

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(kwargs[name] for name in _NAMES if name in kwargs)
        return (hidden, None) if as_tuple else hidden

    def hand_out(*args: Any, **kwargs: Any) -> Any:
        return (state, None) if as_tuple else state

    forwards = [hand_on] * len(blocks)
    if state is not None:
        forwards[-1] = hand_out
    return replaced(blocks, forwards)


@contextmanager
def output_of(block: nn.Module) -> Iterator[list[Any]]:
    """While it is open, what the block hands out is put into the list, before any edit: (hidden states, is a tuple)."""
    found: list[Any] = []
    inner = block.forward

    def keep(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        found.append((hidden.detach(), isinstance(output, tuple)))
        return output

    with replaced([block], [keep]):
        yield found
