"""A GGUF file as a directory that `from_pretrained` reads, made once: reading GGUF costs 20 s, the copy under 1 s.

    directory = dequantised("model.gguf")

The copy lies in `$REFTUNE_CACHE`, else `$XDG_CACHE_HOME/reftune`, else `~/.cache/reftune`, under the SHA-256 of the
file's content: a changed file has another copy, a moved one the same. It is written beside its place and renamed, under
a lock, and a manifest of sizes inside is checked at every use: a killed or truncated write is never read.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

_LAYOUT = "2"  # raise when what is written changes, so that older copies are made anew
_MANIFEST = "reftune.json"


def cache_dir() -> Path:
    """Where reftune keeps what it can make again."""
    if os.environ.get("REFTUNE_CACHE"):
        return Path(os.environ["REFTUNE_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "reftune"


def dequantised(file: str | Path) -> Path:
    """The directory with the weights of a GGUF file as safetensors, its config and its tokenizer, made if needed."""
    from filelock import FileLock

    file = Path(file).resolve()
    digest = _sha256(file)
    root = cache_dir() / "gguf"
    target = root / f"{file.stem}-{digest[:16]}-{_LAYOUT}"
    if _complete(target):
        return target
    _need_gguf(file)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{target.name}.lock"):
        if _complete(target):  # another process made it while this one waited
            return target
        for leftover in (*root.glob(f".{target.name}-*"), target):  # of writers that were killed
            if leftover.is_dir():
                shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
        try:
            _convert(file, work)
            _seal(work, file, digest)
            work.rename(target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return target


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(file: Path, work: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    # The weights are plain floats now, but transformers refuses to save a model whose config says "gguf".
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)
    for name, number in _special_ids(file).items():  # transformers 5.17 exchanges bos and eos and forgets pad
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)


def _special_ids(file: Path) -> dict[str, int]:
    """The ids that the file gives for bos, eos and pad, of those that it gives."""
    from gguf import GGUFReader

    fields = GGUFReader(str(file)).fields
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    found = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: int(field.contents()) for name, field in found.items() if field is not None}


def _seal(work: Path, file: Path, digest: str) -> None:
    """Write the manifest, and everything to the disk before the rename makes it visible."""
    sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
    manifest = {"source": file.name, "sha256": digest, "files": sizes}
    (work / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in work.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _complete(target: Path) -> bool:
    try:
        sizes = json.loads((target / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _need_gguf(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"Reading {file.name} needs the package gguf: pip install 'reftune[gguf]'.")
