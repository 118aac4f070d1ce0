"""What adapters do to each other on prompts: each one's effect alone, and its effect when the other is on too.

The effect of a on x (logits, or the states at a site) is x_a − x_0; beside b it is x_ab − x_b. The change is
‖(x_ab − x_b) − (x_a − x_0)‖ / ‖x_a − x_0‖: 0 where the two do not touch each other, 1 where b undoes a
or doubles it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tuner import ReftLayer, ReftModel
from ..tuner.mix import How, Mix
from ..tuner.probing import hidden_states
from ..tuner.with_lora import only_lora_of


@dataclass(frozen=True)
class Measured:
    """The relative change of each adapter's effect by the other: of the next token's logits, and at every shared site.

    next_token_a, next_token_b: the share of prompts whose likeliest next token with both on is that of a (of b) alone.
    """

    prompts: int
    how: How
    a_changed: float
    b_changed: float
    next_token_a: float
    next_token_b: float
    states: dict[str, tuple[float, float]]


class Measurer:
    """Runs the prompts under several mixes, each once."""

    def __init__(
        self, model: Any, tuner: ReftModel, tokenizer: Any, prompts: Sequence[str], how: How, chat_template: bool | None
    ) -> None:
        if not tuner.session.reads_labels:  # no causal language model
            raise ValueError(
                f"What prompts measure is the next token, which a {type(tuner.model).__name__} does not tell: leave "
                "prompts out, and the weights alone are compared."
            )
        self.model, self.tuner, self.how = model, tuner, how
        self.inputs = _tokens(tokenizer, prompts, next(tuner.model.parameters()).device, chat_template)
        self.count = len(prompts)
        paths = [path for path, layer in tuner.model.named_modules() if isinstance(layer, ReftLayer)]
        self.sites = [path.replace(".edit_", ".") for path in paths]
        self._seen: dict[tuple[str, ...], tuple[Tensor, dict[str, Tensor]]] = {}

    def pair(self, a: str, b: str, sites: Sequence[str]) -> Measured:
        """What a and b do to each other."""
        (x0, s0), (xa, sa), (xb, sb), (xab, sab) = (self._run(names) for names in ((), (a,), (b,), (a, b)))
        top = [x.argmax(-1) for x in (xa, xb, xab)]
        return Measured(
            prompts=self.count,
            how=self.how,
            a_changed=_change(x0, xa, xb, xab),
            b_changed=_change(x0, xb, xa, xab),
            next_token_a=float((top[2] == top[0]).double().mean()),
            next_token_b=float((top[2] == top[1]).double().mean()),
            states={s: (_change(s0[s], sa[s], sb[s], sab[s]), _change(s0[s], sb[s], sa[s], sab[s])) for s in sites},
        )

    def _run(self, names: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """The next token's logits (B, vocabulary) and the states that left each site, (B, L, d)."""
        if names not in self._seen:
            states: dict[str, Tensor] = {}
            handles = [_watch(self.tuner.model, site, states) for site in self.sites]
            was_training = self.model.training
            self.model.eval()
            try:
                mix = Mix(dict.fromkeys(names, 1.0), self.how)
                with torch.no_grad(), self.tuner.session.mixing(mix), only_lora_of(self.tuner.model, names):
                    logits = self.model(**self.inputs).logits[:, -1].cpu().double()
            finally:
                self.model.train(was_training)
                for handle in handles:
                    handle.remove()
            real = self.inputs["attention_mask"].cpu().bool().unsqueeze(-1)
            self._seen[names] = logits, {path: h.cpu().double() * real for path, h in states.items()}
        return self._seen[names]


def _watch(model: Any, site: str, states: dict[str, Tensor]) -> Any:
    """Keep the states at a site as they are after its edits, or where there are none; gives the hook's handle."""
    path, _, where = site.rpartition(".")
    module = model.get_submodule(path)

    def after(module: Any, args: Any, output: Any) -> None:
        found = hidden_states(output)
        if found is not None:
            states[site] = found.detach()

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 3:
                states[site] = value.detach()
                return

    # registered after the edit's own hook, so they run after it
    return (
        module.register_forward_hook(after)
        if where == "output"
        else module.register_forward_pre_hook(before, with_kwargs=True)
    )


def _change(x0: Tensor, alone: Tensor, other: Tensor, both: Tensor) -> float:
    effect = float((alone - x0).norm())
    change = float(((both - other) - (alone - x0)).norm())
    return change / effect if effect > 0 else (0.0 if change == 0 else float("inf"))


def _tokens(tokenizer: Any, prompts: Sequence[str], device: Any, chat_template: bool | None) -> dict[str, Tensor]:
    """The prompts padded on the left, so that the last column is everyone's last token."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text.")
    if chat_template is None:
        chat_template = getattr(tokenizer, "chat_template", None) is not None
    rows = []
    for prompt in prompts:
        if chat_template:
            message = [{"role": "user", "content": prompt}]
            rows.append(
                tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
            )
        else:
            rows.append(tokenizer(prompt)["input_ids"])
    width = max(map(len, rows))
    if min(map(len, rows)) == 0:
        raise ValueError("One of the prompts has no tokens.")
    fill = getattr(tokenizer, "pad_token_id", None) or 0
    ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
