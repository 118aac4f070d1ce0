"""A tokenizer of single characters with a ChatML template, and a tiny model for it: no network, no downloads."""

from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat: bool = True) -> Any:
    """A byte-level tokenizer: <|endoftext|>, <|im_start|>, <|im_end|> (eos and pad), 256 bytes, and one merge, "aa"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet, "aa"])}, merges=[("a", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[2], pad_token=special[2], bos_token=special[1], unk_token=special[0]
    )
    tokenizer.chat_template = CHATML if chat else None
    return tokenizer


def tiny_model() -> Any:
    """A random Llama with the vocabulary of `tiny_tokenizer`, 2 blocks of width 16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=3 + 256 + 1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(directory: Path, chat: bool = True) -> Path:
    """The model and the tokenizer in a directory that `load_model` reads."""
    tiny_model().save_pretrained(directory)
    tiny_tokenizer(chat).save_pretrained(directory)
    return directory


def write_gguf(path: Path, bos: bool = True) -> Path:
    """A GGUF file with a tiny Llama and a byte-level tokenizer, as llama.cpp's converters write it."""
    import gguf
    import numpy as np

    model, tokenizer = tiny_model(), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["a a", "a a"])  # twice, for transformers 5.17 takes a list of one for a string
    if bos:
        writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        parts, array = key.split("."), tensor.numpy().astype(np.float32)
        if parts[1] == "layers":
            if parts[4] in heads:  # llama.cpp keeps the two halves of a rotary pair side by side
                count = heads[parts[4]]
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            name = parts[4] if parts[4] in names else parts[3]
            writer.add_tensor(f"blk.{parts[2]}.{names[name]}.weight", np.ascontiguousarray(array))
        else:
            top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
            writer.add_tensor(f"{top[parts[-2]]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
