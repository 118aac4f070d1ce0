"""Shared by all tests: offline, single-threaded torch, tiny random models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; tests run side by side

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(
    layers: int = 4, hidden: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A random Llama of a few thousand numbers; vocabulary 99, pad 0, bos 1, eos 98."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=98,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()
