"""Answers of a causal model scored: by generation, by log-likelihood, by loss. All in eval mode, without gradients.

    generate(model, tokenizer, prompts, max_new_tokens=32)          # ["the correct answer is ...", ...]
    choice_scores(model, prompts, choices, pad_id)                  # log p of each choice, prompts read once
    continuation_scores(model, pairs, collator)                     # (log p, tokens) of each (prompt, response)

Prompts and responses are lists of token ids; where a prompt ends is said to ReFT adapters in each way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reftune.tuner.caches import cache_name, cache_of

from .logits import labelled_logits, output_layer

Ids = list[int]


@torch.no_grad()
def continuation_scores(
    model: Any, pairs: Sequence[tuple[Ids, Ids]], collator: Any, batch_size: int = 16
) -> list[tuple[float, int]]:
    """(Σ log p(token), number of tokens) of each response after its prompt, as lm-evaluation-harness scores it."""
    found: list[tuple[float, int]] = [(0.0, 0)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [{"input_ids": p + r, "labels": [-100] * len(p) + r} for p, r in (pairs[i] for i in chosen)]
        batch = {k: v.to(model.device) for k, v in collator(rows).items()}
        logits, tokens, where = labelled_logits(model, batch)
        each = -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
        sums = torch.zeros(len(chosen), device=each.device).index_add_(0, where, each)
        for i, total in zip(chosen, sums.tolist(), strict=True):
            found[i] = (total, len(pairs[i][1]))
    return found


@torch.no_grad()
def choice_scores(
    model: Any, prompts: Sequence[Ids], choices: Sequence[Sequence[Ids]], pad_id: int, batch_size: int = 16
) -> list[list[float]]:
    """Σ log p of every choice after its prompt. Each prompt is read once; its cache is repeated for its choices."""
    found: list[list[float]] = [[] for _ in prompts]

    def size(i: int) -> int:  # the tokens that row i is, its choices padded to the longest
        return len(prompts[i]) + len(choices[i]) * max(map(len, choices[i]))

    order = sorted(range(len(prompts)), key=lambda i: (len(choices[i]), -size(i)))
    while order:
        count = len(choices[order[0]])  # a batch's prompts have as many choices each
        chosen = [i for i in order[:batch_size] if len(choices[i]) == count]
        order = order[len(chosen) :]
        scores = _batch_scores(model, [prompts[i] for i in chosen], [list(choices[i]) for i in chosen], pad_id)
        for i, row in zip(chosen, scores.tolist(), strict=True):
            found[i] = row
    return found


def _batch_scores(model: Any, prompts: list[Ids], choices: list[list[Ids]], pad_id: int) -> Tensor:
    """(prompts, choices) log-likelihoods; the same number of choices for each prompt."""
    count, device = len(choices[0]), model.device
    ids, mask = pad([*prompts], pad_id, left=True, device=device)
    where = {"attention_mask": mask, "position_ids": _positions(mask)}
    with output_layer(model):
        output = model(input_ids=ids, **where, use_cache=True, logits_to_keep=1)
    cache = cache_of(output)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(cache, "batch_repeat_interleave"):
        raise ValueError(f"{type(cache).__name__} cannot be repeated: score with continuation_scores instead.")
    cache.batch_repeat_interleave(count)
    flat = [ids for row in choices for ids in row]
    tokens, real = pad(flat, pad_id, left=False, device=device)
    first = output.logits[:, -1].float().log_softmax(-1).repeat_interleave(count, 0)
    scores = first.gather(1, tokens[:, :1]).squeeze(1)
    if tokens.shape[1] > 1:
        whole = torch.cat([mask.repeat_interleave(count, 0), real[:, :-1]], 1)
        follows = real[:, 1:].bool()
        with output_layer(model, follows):
            rest = model(
                input_ids=tokens[:, :-1],
                attention_mask=whole,
                position_ids=_positions(whole)[:, mask.shape[1] :],
                use_cache=True,
                **{str(cache_name(base)): cache},
            ).logits
        each = -torch.nn.functional.cross_entropy(rest.float(), tokens[:, 1:][follows], reduction="none")
        scores = scores.index_add(0, follows.nonzero()[:, 0], each)
    return scores.view(len(prompts), count)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    **settings: Any,
) -> list[str]:
    """The answers to prompts, special tokens left out; greedy unless `settings` (of `generate`) say otherwise."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    pad_id = pad_of(tokenizer)
    settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | settings
    if settings["do_sample"]:
        settings = {key: value for key, value in settings.items() if value is not None}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = pad([prompts[i] for i in chosen], pad_id, left=True, device=model.device)
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad_id, **settings
        )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    return answers


def pad(rows: list[Ids], pad_id: int, *, left: bool, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask, both (rows, longest), int64."""
    length = max(map(len, rows))
    gaps = [length - len(row) for row in rows]
    ids = [[pad_id] * g + row if left else row + [pad_id] * g for row, g in zip(rows, gaps, strict=True)]
    mask = [[0] * g + [1] * (length - g) if left else [1] * (length - g) + [0] * g for g in gaps]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def pad_of(tokenizer: Any) -> int:
    """The id to pad with."""
    known = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None]
    return int(known[0]) if known else 0


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
