"""Tiny models and data folders for the bench: a grid over them runs in seconds."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

from tests.tiny_chat import save_tiny, tiny_tokenizer

from reftune.bench import load_grid

TRAIN = {"steps": 3, "batch_size": 4}

DATA = next((p for p in (Path(__file__).parents[3] / "shared" / "data",) if p.is_dir()), None)


def tiny_encoder(directory: Path) -> Path:
    """A random BERT of 2 blocks of width 16, with a tokenizer of characters."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=260, pad_token_id=2, **sizes)).save_pretrained(directory)
    tiny_tokenizer(chat=False).save_pretrained(directory)
    return directory


def tiny_causal(directory: Path) -> Path:
    """The tiny Llama of the chat tests, without a chat template."""
    return save_tiny(directory, chat=False)


def write_rows(place: Path, **splits: list[dict[str, Any]]) -> None:
    """Rows as `{place}/{split}.jsonl.gz`."""
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def tiny_grid(root: Path, suite: str) -> tuple[str, dict[str, Any]]:
    """Where the data are, and what grids of GLUE and of instructions over a tiny model have in common."""
    glue = suite == "glue"
    made = tiny_encoder(root / "base") if glue else tiny_causal(root / "base")
    content = {"suite": suite, "tasks": ["rte" if glue else "alpaca"], "model": str(made)}
    content |= {"scoring": {"max_new_tokens": 2}, "rows": {"train": 8, "select": 4, "test": 4}}
    return str(tiny_data(root / "data")), content


def tiny_data(root: Path) -> Path:
    """Every suite in small: rte and stsb, arc_easy and boolq, addsub and aqua, ultrafeedback and alpaca."""
    pairs = [{"sentence1": "abab"[i % 3 :], "sentence2": "ba" * (i % 2 + 1), "label": i % 2} for i in range(24)]
    write_rows(root / "glue" / "rte", train=pairs, validation=pairs[:16])
    scores = [dict(row, label=float(i % 5)) for i, row in enumerate(pairs)]
    write_rows(root / "glue" / "stsb", train=scores, validation=scores[:16])
    options = [
        {"context": "", "question": f"q{i}", "choices": list("abcd"[: 4 - (i == 3)]), "answer": i % 3}
        for i in range(20)
    ]
    write_rows(root / "commonsense" / "arc_easy", train=options, test=options[:6])
    truths = [{"context": "", "question": f"is {i}?", "choices": ["true", "false"], "answer": i % 2} for i in range(20)]
    write_rows(root / "commonsense" / "boolq", train=truths, validation=truths[:6])
    sums = [{"question": f"{i} + {i} ?", "answer": 2 * i, "solution": f"X={i}+{i}", "choices": None} for i in range(20)]
    write_rows(root / "arithmetic" / "addsub", train=sums, test=sums[:4])
    letters = [{"question": f"q{i}", "choices": list("vwxyz"), "answer": i % 5, "solution": None} for i in range(20)]
    write_rows(root / "arithmetic" / "aqua", train=letters, validation=letters[:4])
    prefs = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": "bad bad"} for i in range(12)]
    write_rows(root / "instruct" / "ultrafeedback", train=prefs, validation=prefs[:4])
    asked = [{"instruction": f"do {i}", "input": "x" * (i % 2), "output": f"done {i}"} for i in range(12)]
    write_rows(root / "instruct" / "alpaca", train=asked, validation=asked[:4])
    write_rows(root / "instruct" / "alpaca_eval", test=asked[:3])
    return root


def environment() -> dict[str, str]:
    """For processes that tests start: offline, one thread, this repository on the path."""
    root = Path(__file__).parents[2]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def glue(places: dict[str, str], **more: Any) -> Any:
    methods = [{"method": "loreft", "lrs": [1e-2, 1e-1]}, {"method": "lora", "r": 2, "lrs": [1e-2]}]
    content = {"suite": "glue", "tasks": ["rte"], "model": places["encoder"], "methods": methods, "seeds": [0, 1]}
    return load_grid(content | {"train": TRAIN, "sweep": {"steps": 2, "by": "score"}} | more)


def silent(_: str) -> None:
    pass
