"""The model card (README.md) of a saved adapter: what it edits, how big it is, how to load it.

    text = model_card(config, sites=["model.layers.15.output"], parameters=4612, nbytes=19_512)

A function of its arguments alone; nothing is written or asked of the hub.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from ..interventions import INTERVENTIONS
from ..positions import parse
from ..sites import number_ranges
from ..tuner import ReftConfig

# kind → (what it is called, its formula)
FORMULAS = {
    "loreft": ("LoReFT", "h + Rᵀ(Wh + b − Rh), R Rᵀ = I"),
    "noreft": ("NoReFT", "h + Rᵀ(Wh + b − Rh), R free"),
    "consreft": ("ConsReFT", "h + Rᵀ(b − Rh), R Rᵀ = I"),
    "lobireft": ("LobiReFT", "h + Rᵀb, R Rᵀ = I"),
    "direft": ("DiReFT (pyreft's)", "h + Rᵀ(Wh + b), R Rᵀ = I"),
    "nodireft": ("NodiReFT (the paper's DiReFT)", "h + Rᵀ(Wh + b), R free"),
    "red": ("RED", "s⊙h + b"),
    "reft_r1": ("ReFT-r1", "h + mean(top-k ReLU(h·w)) w, ‖w‖ = 1"),
    "postblock": ("post-block low-rank edit", "h + W_upᵀ SiLU(W_down h)"),
}

# task_type → (Auto class, the hub's pipeline tag)
_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
}
_CLASSES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
# main_input_name → what the processor is called with
_INPUTS = {
    "pixel_values": 'images=image, return_tensors="pt")  # a PIL image',
    **dict.fromkeys(
        ("input_values", "input_features"),
        'audio, sampling_rate=16_000, return_tensors="pt")  # samples, at the rate of the base',
    ),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def model_card(
    config: ReftConfig,
    sites: Sequence[str],
    parameters: int,
    nbytes: int,
    versions: Mapping[str, str] | None = None,
    base_class: str = "",
    reads: str = "input_ids",
) -> str:
    """The card, Markdown with YAML front matter.

    Args:
        config: of the adapter; `base_model_name_or_path` is the base that the card names.
        sites: the edited places, such as "model.layers.15.output".
        parameters: how many numbers the adapter has.
        nbytes: size of the saved weights.
        versions: package → version, to state; None states the installed reftune, peft, transformers and torch.
        base_class: name of the base model's class; the snippet loads with it where the config names no task.
        reads: the base model's `main_input_name`; the snippet makes such inputs.
    """
    base = config.base_model_name_or_path or ""
    base_class = base_class or str((config.auto_mapping or {}).get("base_model_class") or "")
    task = None if reads in _INPUTS else _task(config, base_class)  # tasks are of texts
    return "\n".join(
        [
            *_front_matter(base, task),
            "",
            f"# ReFT adapter for {base or 'a base model that its config does not name'}",
            "",
            "Representation finetuning ([arXiv 2404.03592](https://arxiv.org/abs/2404.03592)): the base model is "
            "frozen, and a few of its hidden states h are edited. Made with reftune, as a PEFT adapter.",
            "",
            *_table(config, base, sites, parameters, nbytes),
            "",
            "## Load it",
            "",
            "Import `reftune` first: it adds the method to PEFT. Without it PEFT raises `KeyError: 'REFT'`.",
            "",
            "```python",
            *_snippet(base, task, base_class, reads),
            "```",
            "",
            "Give the model prompts in the format it was trained on: the edited positions are counted in the whole "
            "prompt, the chat template included.",
            "",
            "## Versions",
            "",
            *(f"- {name} {number}" for name, number in (_installed() if versions is None else versions).items()),
            "",
        ]
    )


def formula(kind: str) -> tuple[str, str]:
    """Name and formula of a kind; for one of your own its class and the first line of its docstring."""
    if kind in FORMULAS:
        return FORMULAS[kind]
    cls = INTERVENTIONS.get(kind)
    if cls is None:
        return kind, "not known here: import the module that registers this kind"
    return cls.__name__, (cls.__doc__ or "see its class").strip().splitlines()[0]


def positions_in_words(expression: str) -> str:
    """What an expression names: "f2+l1" → "the first 2 tokens and the last token of the prompt"."""
    prompt: list[str] = []
    others: list[str] = []
    for term in parse(expression):
        n = term.number
        words = {
            "f": f"the first {n} tokens" if n > 1 else "the first token",
            "l": f"the last {n} tokens" if n > 1 else "the last token",
            "mid": f"{n} tokens in the middle" if n > 1 else "the token in the middle",
            "prompt": "every token",
            "all": "every token, of the prompt and generated",
            "gen": "every generated token",
            "gen:": f"the first {n} generated tokens" if n > 1 else "the first generated token",
            "gen/": f"every {_ordinal(n)} generated token" if n > 1 else "every generated token",
        }[term.name]
        (prompt if term.in_prompt else others).append(words)
    if prompt:
        others.insert(0, f"{_and(prompt)} of the prompt")
    return _and(others)


def layers_in_words(sites: Sequence[str]) -> str:
    """The block numbers of sites such as "model.layers.15.output", in ranges: "0-3, 15"; "" where none has one."""
    return number_ranges(int(found[1]) for site in sites if (found := re.search(r"\.(\d+)(\.|$)", site)))


def _front_matter(base: str, task: str | None) -> list[str]:
    """The hub checks these: a base that is no hub id (a directory, a file) must not stand here."""
    from ..models import BUNDLED, BUNDLED_HUB_ID

    hub_id = BUNDLED_HUB_ID if base == BUNDLED else base
    lines = ["---"]
    if _HUB_ID.fullmatch(hub_id) and not hub_id.endswith(".gguf") and not os.path.isdir(hub_id):
        lines.append(f"base_model: {json.dumps(hub_id)}")
    lines += ["library_name: peft", "tags:", "- reft", "- reftune", "- peft"]
    tag = _TASKS.get(task or "", (None, None))[1]
    if tag is not None:
        lines.append(f"pipeline_tag: {tag}")
    return [*lines, "---"]


def _task(config: ReftConfig, base_class: str) -> str | None:
    """The task that the config names, or that the base's class tells; of a base without a class, causal."""
    task = str(getattr(config.task_type, "value", config.task_type))
    if task in _TASKS or not base_class:
        return task if task in _TASKS else "CAUSAL_LM"
    return next((task for ending, task in _CLASSES.items() if base_class.endswith(ending)), None)


def _table(config: ReftConfig, base: str, sites: Sequence[str], parameters: int, nbytes: int) -> list[str]:
    edits = config.edits()
    kinds = dict.fromkeys(edit["intervention"] for edit in edits)
    expressions = dict.fromkeys(edit["positions"] for edit in edits)
    components = dict.fromkeys(edit["component"] for edit in edits)
    ranks = dict.fromkeys(str(edit["r"]) for edit in edits if edit["r"] is not None and _has_rank(edit["intervention"]))
    settings = dict.fromkeys(f"f = {edit['act_fn']} on Wh + b" for edit in edits if edit["act_fn"])
    shared = any("+" in group for expression in expressions for group in config.groups(expression))
    several = any("+" in expression for expression in expressions) and not shared
    one_each = " (an intervention for each term)" if several else " (one intervention for all terms)" if shared else ""
    layers = layers_in_words(sites)
    depth = (config.base_model_shape or {}).get("num_hidden_layers")
    rows = [
        ("Base model", f"`{base}`" if base else "not named"),
        ("Kind", "; ".join(f"{name}: {text}" for name, text in map(formula, kinds))),
        *((("Activation", "; ".join(settings)),) if settings else ()),
        ("Positions", "; ".join(f"`{text}`: {positions_in_words(text)}" for text in expressions) + one_each),
        ("Layers", (layers or "none with a number") + (f" of {depth}" if depth and layers else "")),
        ("Component", ", ".join(f"`{name}`" for name in components)),
        *((("Rank", ", ".join(ranks)),) if ranks else ()),
        *_forms(config),
        ("Size", f"{parameters:,} parameters, {nbytes / 1000:,.1f} kB on disk"),
    ]
    if config.modules_to_save:
        rows.append(("Trained and saved whole", ", ".join(f"`{name}`" for name in config.modules_to_save)))
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows)]


def _forms(config: ReftConfig) -> list[tuple[str, str]]:
    """What else makes the adapter what it is: its parts, and what it was trained with."""
    rows = []
    for edit in config.edits()[:1]:
        if edit["subspaces"]:
            rows.append(
                ("Subspaces", ", ".join(f"`{name}`: {rank}" for name, rank in sorted(edit["subspaces"].items())))
            )
        if edit["stack"]:
            between = f", `{edit['between']}` between" if edit["between"] else ""
            rows.append(("Stack", f"stages of rank {', '.join(map(str, edit['stack']))}{between}"))
        if edit["nested"]:
            ranks = "every rank" if edit["nested"] is True else f"the ranks {', '.join(map(str, edit['nested']))}"
            rows.append(("Nested", f"trained for {ranks}; `reftune.load_adapted(..., rank=k)` loads the first k rows"))
    if config.orthogonal_to:
        rows.append(("Orthogonal to", ", ".join(f"`{name}`" for name in config.orthogonal_to)))
    if config.lora:
        rows.append(("LoRA part", f"rank {config.lora['r']} on {', '.join(map(str, _targets(config.lora)))}"))
    return rows


def _targets(lora: Mapping[str, object]) -> list[object]:
    targets = lora["target_modules"]
    return sorted(targets) if isinstance(targets, (list, set, tuple)) else [targets]


def _snippet(base: str, task: str | None, base_class: str, reads: str) -> list[str]:
    from ..models import BUNDLED

    adapter = 'adapter = "."  # this directory, or the id of this adapter on the hub'
    first = "import reftune  # first: PEFT learns the method from it"
    if task == "CAUSAL_LM" and (base == BUNDLED or base.endswith(".gguf")):
        lines = [first, "from reftune.models import load_adapted", "", adapter]
        lines += ["model, tokenizer = load_adapted(adapter)"]
    else:
        auto = _TASKS[task][0] if task else base_class
        labels = "  # with num_labels=... as in training" if "Classification" in auto else ""
        reader, maker = ("processor", "AutoProcessor") if reads in _INPUTS else ("tokenizer", "AutoTokenizer")
        lines = [first, "from peft import PeftModel", f"from transformers import {auto}, {maker}", "", adapter]
        lines += [f"base = {json.dumps(base or 'THE-BASE-MODEL')}", f"{reader} = {maker}.from_pretrained(base)"]
        lines += [f"model = {auto}.from_pretrained(base){labels}"]
        lines += ["model = PeftModel.from_pretrained(model, adapter)"]
    if reads in _INPUTS:
        lines += ["", f"inputs = processor({_INPUTS[reads]}"]
        if not base_class.endswith("ForConditionalGeneration"):
            return [*lines, "print(model(**inputs))"]
        lines += ["output = model.generate(**inputs, max_new_tokens=64)"]
        return [*lines, "print(processor.batch_decode(output, skip_special_tokens=True)[0])"]
    lines += ["", 'inputs = tokenizer("A prompt", return_tensors="pt")']
    if task == "CAUSAL_LM":
        lines += ["output = model.generate(**inputs, max_new_tokens=64)"]
        return [*lines, 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))']
    if task == "SEQ_2_SEQ_LM" or base_class.endswith("ForConditionalGeneration"):
        lines += ["output = model.generate(**inputs, max_new_tokens=64)"]
        return [*lines, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]
    return [*lines, "print(model(**inputs))"]


def _has_rank(kind: str) -> bool:
    return INTERVENTIONS[kind].has_rank if kind in INTERVENTIONS else True


def _installed() -> dict[str, str]:
    from .. import __version__

    found = {"reftune": __version__}
    for name in ("peft", "transformers", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
