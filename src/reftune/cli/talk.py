"""Ask a model: `reply` for a list of prompts at once, `stream` for one answer as it comes, `chat` for a conversation.

talker = open_model(adapter="runs/emoji")
reply(talker, ["Good morning!"])                    # ["🌅..."]
reply(talker, ["Good morning!"], adapter=False)     # the base model's answer
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftune.composition import load_composed, load_composition
from reftune.data import PromptTemplate
from reftune.data.template import some
from reftune.models import BUNDLED, load_adapted, load_model

Messages = list[dict[str, str]]

HELP = "/base [text]: the base model's answer to text, or to your last message; /reset: forget; /quit: end."


@dataclass(frozen=True)
class Talker:
    """A model, its tokenizer, and how messages become tokens."""

    model: Any
    tokenizer: Any
    template: PromptTemplate

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter to turn off."""
        return hasattr(self.model, "disable_adapter")


def open_model(adapter: str | None = None, model: str | None = None, *, dtype: Any = None) -> Talker:
    """Load an adapter with its base, or a model alone (smollm2-135m if neither is given).

    The chat template and system message are those of the adapter's training, from the `recipe.yaml` beside it.
    """
    if adapter is None:
        loaded, tokenizer = load_model(model or BUNDLED, dtype=dtype)
        template = PromptTemplate(tokenizer)
    elif model is None:
        load = load_composed if _is_composition(adapter) else load_adapted
        loaded, tokenizer = load(adapter, dtype=dtype)
        template = _trained_template(adapter, tokenizer)
    else:
        from peft import PeftModel

        base, tokenizer = load_model(model, dtype=dtype)
        loaded = (
            load_composition(base, adapter) if _is_composition(adapter) else PeftModel.from_pretrained(base, adapter)
        )
        template = _trained_template(adapter, tokenizer)
    return Talker(_to_accelerator(loaded).eval(), tokenizer, template)


def _is_composition(directory: str) -> bool:
    """Whether `save_composition` wrote the directory: several adapters, and how they go together."""
    return (Path(directory) / "composition.json").is_file()


@dataclass(frozen=True)
class Answer:
    """An answer's text, and whether the model ended it itself (or was cut at max_new_tokens)."""

    text: str
    ended: bool


def answer(
    talker: Talker,
    prompts: Sequence[str | Messages],
    *,
    adapter: bool = True,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    **kwargs: Any,
) -> list[Answer]:
    """The answers to several prompts, generated as one batch. `**kwargs` go to `generate`."""
    import torch

    rows = [some(talker.template.prompt_ids(prompt)) for prompt in prompts]
    length = max(map(len, rows))
    options = _options(talker, max_new_tokens, temperature) | kwargs
    fill = options["pad_token_id"] or 0
    device = talker.model.device
    ids = torch.tensor([[fill] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    with torch.inference_mode(), _switch(talker, adapter):
        output = talker.model.generate(input_ids=ids, attention_mask=mask, **options)[:, length:]
    ends = _end_tokens(talker)
    texts = talker.tokenizer.batch_decode(output, skip_special_tokens=True)
    return [
        Answer(text.strip(), any(token in ends for token in row))
        for text, row in zip(texts, output.tolist(), strict=True)
    ]


def reply(talker: Talker, prompts: Sequence[str | Messages], **options: Any) -> list[str]:
    """The texts of `answer`, which takes the same options."""
    return [found.text for found in answer(talker, prompts, **options)]


def stream(
    talker: Talker, messages: str | Messages, *, adapter: bool = True, write: Callable[[str], None], **options: Any
) -> str:
    """One answer, given to `write` piece by piece and returned whole."""
    from transformers import TextStreamer

    pieces: list[str] = []

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            write(text)

    streamer = Pieces(talker.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[no-untyped-call]
    answer(talker, [messages], adapter=adapter, streamer=streamer, **options)
    return "".join(pieces).strip()


def chat(
    talker: Talker,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    read: Callable[[], str] | None = None,
    write: Callable[[str], None] | None = None,
) -> None:
    """A conversation until /quit or the end of the input. What the base answers to /base is not kept in it."""
    read = read or (lambda: input("you> "))
    write = write or (lambda text: print(text, end="", flush=True))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    turns: Messages = []
    write(HELP + "\n")
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        command, _, text = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            turns = []
            write("(forgotten)\n")
        elif command == "/base":
            _compare(talker, turns, text.strip(), write, options)
        elif command.startswith("/"):
            write(f"There is no command {command}. {HELP}\n")
        elif line:
            # A plain template has room for one message only: there, every turn stands alone.
            earlier = turns if talker.template.is_chat else []
            asked: Messages = [*earlier, {"role": "user", "content": line}]
            said = stream(talker, asked, write=write, **options)
            write("\n")
            turns = [*asked, {"role": "assistant", "content": said}]


def _compare(talker: Talker, turns: Messages, text: str, write: Callable[[str], None], options: dict[str, Any]) -> None:
    """The base model's answer to `text`, or to the last message again."""
    if not talker.has_adapter:
        write("There is no adapter to turn off: this is the base model already.\n")
        return
    if not text and not turns:
        write("There is no message yet to answer again. Write /base and a text.\n")
        return
    if text:
        earlier = turns if talker.template.is_chat else []
        asked = [*earlier, {"role": "user", "content": text}]
    else:
        asked = turns[:-1]  # without the adapter's answer
    write("(base) ")
    stream(talker, asked, adapter=False, write=write, **options)
    write("\n")


def _options(talker: Talker, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    # What a checkpoint's generation_config says about sampling would draw a warning under greedy decoding.
    options |= {"temperature": temperature} if temperature > 0 else {"temperature": None, "top_p": None, "top_k": None}
    pad = talker.tokenizer.pad_token_id
    return options | {"pad_token_id": pad if pad is not None else talker.tokenizer.eos_token_id}


def _end_tokens(talker: Talker) -> set[int]:
    ends = getattr(talker.model.generation_config, "eos_token_id", None)
    ends = talker.tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, list | tuple) else {ends}


def _switch(talker: Talker, adapter: bool) -> Any:
    return nullcontext() if adapter or not talker.has_adapter else talker.model.disable_adapter()


def _trained_template(adapter: str, tokenizer: Any) -> PromptTemplate:
    path = Path(adapter) / "recipe.yaml"
    if not path.is_file():
        return PromptTemplate(tokenizer)
    from reftune.train import load_recipe

    data = load_recipe(path).data
    return PromptTemplate(tokenizer, data.template, data.system)


def _to_accelerator(model: Any) -> Any:
    import torch

    if torch.accelerator.is_available() and getattr(model, "hf_device_map", None) is None:
        return model.to(torch.accelerator.current_accelerator())
    return model
