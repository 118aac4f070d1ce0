"""ReFT adapters in lm-evaluation-harness: its `HFLM`, told where each context ends.

    python -m reftune.bench.lm_eval run --model reftune \
        --model_args pretrained=smollm2-135m,peft=runs/emoji --tasks arc_easy

The harness calls a model on context + continuation, padded on the right, without a mask: a suffix such as `l2` would
land on the continuation or on the padding. `ReftLM` passes a mask and `prompt_mask`, so that contexts are prompts.
`pretrained` may be whatever `reftune.load_model` takes, an adapter's directory, or a loaded model. Nothing else of
reftune imports this module; it needs the package `lm_eval`.
"""

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

import reftune  # noqa: F401  (makes PEFT know saved ReFT adapters)
from reftune.bench.logits import takes_prompt_mask
from reftune.models import BUNDLED, load_adapted, load_model

Request = tuple[Any, list[int], list[int]]  # (cache key, context ids, continuation ids)


@register_model("reftune")
class ReftLM(HFLM):
    """`HFLM` for causal models that may carry a ReFT adapter. Arguments are HFLM's; other adapters work as well."""

    def __init__(self, pretrained: Any, peft: str | None = None, tokenizer: Any = None, **kwargs: Any) -> None:
        if isinstance(pretrained, str) and (loaded := _ours(pretrained, kwargs.get("dtype"))) is not None:
            pretrained, own = loaded
            tokenizer = tokenizer if tokenizer is not None else own
            pretrained.to(_device(kwargs.get("device")))
        if peft is not None and not isinstance(pretrained, str):
            from peft import PeftModel

            pretrained, peft = PeftModel.from_pretrained(pretrained, peft), None
        super().__init__(pretrained=pretrained, peft=peft, tokenizer=tokenizer, **kwargs)
        if self.backend != "causal":
            raise ValueError("ReftLM scores causal models; for an encoder-decoder use the harness's own hf.")

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(Σ log p of the continuation, whether it is what greedy decoding gives) of each request."""
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            # requests with one input differ in their last token only: one forward pass answers them all
            groups.setdefault((tuple(context), tuple(continuation[:-1])), []).append(number)
        order = sorted(groups, key=lambda key: -len(key[0]) - len(key[1]))
        size = override_bs or self._size(requests)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for start in range(0, len(order), size):
            keys = order[start : start + size]
            for key, scores in zip(keys, self._log_probs(keys), strict=True):
                for number in groups[key]:
                    name, _, continuation = requests[number]
                    found[number] = _score(scores, continuation)
                    if name is not None:
                        self.cache_hook.add_partial("loglikelihood", name, found[number])
                    bar.update(1)
        bar.close()
        return found

    def _log_probs(self, keys: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[torch.Tensor]:
        """log p (continuation length, vocabulary) for (context, continuation without its last token)."""
        rows = [[*context, *rest][-self.max_length :] for context, rest in keys]
        prompts = [max(1, len(row) - len(rest)) for row, (_, rest) in zip(rows, keys, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        columns = torch.arange(longest, device=self.device)
        mask = (columns < torch.tensor([[len(row)] for row in rows], device=self.device)).long()
        where = (columns < torch.tensor([[n] for n in prompts], device=self.device)).long()
        extra = {"prompt_mask": where} if takes_prompt_mask(self.model) else {}
        autocast = torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )
        with torch.no_grad(), autocast:
            logits = self.model(input_ids=ids, attention_mask=mask, **extra).logits
        return [
            logits[i, prompts[i] - 1 : len(rows[i])].log_softmax(-1, dtype=self.softmax_dtype or torch.float32)
            for i in range(len(rows))
        ]

    def _size(self, requests: list[Request]) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        longest = max(requests, key=lambda r: len(r[1]) + len(r[2]))
        return int(self._detect_batch_size([longest]))


def _score(scores: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    tokens = torch.tensor(continuation[-len(scores) :], device=scores.device)
    each = scores.gather(1, tokens.unsqueeze(1))
    return float(each.sum()), bool((scores.argmax(-1) == tokens).all())


def _device(wanted: str | None) -> torch.device:
    """The one asked for, if it is there; where none is asked for, the accelerator, if there is one."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted is None:
        return here or torch.device("cpu")
    device = torch.device(wanted)
    return device if device.type == "cpu" or (here is not None and here.type == device.type) else torch.device("cpu")


def _ours(name: str, dtype: Any) -> tuple[Any, Any] | None:
    """(model, tokenizer) of what the harness cannot load itself: the bundled name, a GGUF file, an adapter."""
    path = Path(name)
    dtype = None if dtype in (None, "auto") else dtype
    if (path / "adapter_config.json").is_file():
        return load_adapted(name, dtype=dtype)
    if name == BUNDLED or path.suffix == ".gguf":
        return load_model(name, dtype=dtype)
    return None


def main() -> None:
    """The harness's own command line, with the model `reftune` known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
