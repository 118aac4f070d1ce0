"""Sentence embeddings: an adapter added, trained, saved and loaded by sentence-transformers' own methods."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.integrations.peft as integration
from packaging.version import Version
from peft import PeftModel
from tests.bench.places import tiny_encoder

from reftune import ReftConfig, get_reft_model

sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
TEXTS = ["ab ba", "b", "a longer text than the others", "ba ab ab"]


@pytest.fixture
def embedder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.17.0")  # 5.24 asks for one that was not out with it
    read = modules.Transformer(str(tiny_encoder(tmp_path / "encoder")))
    pool = modules.Pooling(read.get_embedding_dimension())
    return sentence_transformers.SentenceTransformer(modules=[read, pool], device="cpu")


def embed(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, torch.stack([model.encode(text, convert_to_tensor=True) for text in TEXTS]))
    return found


def train(model: Any, steps: int = 3) -> None:
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        found = model(model.preprocess(TEXTS))["sentence_embedding"]
        (1 - torch.cosine_similarity(found[:2], found[2:])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("positions", ["all", "f1+l1"])
def test_an_adapter_added_by_its_own_method(embedder: Any, positions: str, tmp_path: Path) -> None:
    plain = embed(embedder)
    embedder.add_adapter(ReftConfig(positions=positions, layers="all", task_type="FEATURE_EXTRACTION"))
    assert torch.equal(embed(embedder), plain)
    train(embedder)
    trained = embed(embedder)
    assert not torch.allclose(trained, plain)
    embedder.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size < 10_000
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    if Version(transformers.__version__) >= Version("5.20"):  # 5.0 does not read what it saves, of LoRA neither
        loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        assert torch.equal(embed(loaded), trained)
    embedder.disable_adapters()
    assert torch.equal(embed(embedder), plain)


def test_a_model_adapted_by_ours(embedder: Any, tmp_path: Path) -> None:
    plain = embed(embedder)
    embedder[0].model = get_reft_model(embedder[0].model, ReftConfig(layers="all", task_type="FEATURE_EXTRACTION"))
    assert torch.equal(embed(embedder), plain)
    train(embedder)
    trained = embed(embedder)
    assert not torch.allclose(trained, plain)
    embedder[0].model.save_pretrained(tmp_path / "adapter")
    with embedder[0].model.disable_adapter():
        assert torch.equal(embed(embedder), plain)
    embedder[0].model = PeftModel.from_pretrained(embedder[0].model.unload(), tmp_path / "adapter")
    assert torch.equal(embed(embedder.eval()), trained)
