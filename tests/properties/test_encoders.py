"""Encoders, encoder-decoders, vision, audio and multimodal models: found by structure, edited at the right tokens."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCTC,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    Speech2TextForConditionalGeneration,
)

from reftune import ReftConfig, get_reft_model
from reftune.tuner.layer import ReftLayer

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4},
    "electra": {"embedding_size": 32},
    "eurobert": {"num_key_value_heads": 2, "head_dim": 8},
}
BOTH: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4, "vocab_size": 99},
    "bart": {
        "d_model": 32, "encoder_layers": 4, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99,
        "max_position_embeddings": 64,
    },
}  # fmt: skip


def config(name: str, settings: dict[str, Any]) -> Any:
    made = CONFIG_MAPPING[name](**settings)
    for key, value in made.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(made, key, 0.0)
    return made


def spy(model: torch.nn.Module) -> list[torch.Tensor]:
    """What each edited site changed, (B, L) bool a call."""
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, ReftLayer):
            module.register_forward_hook(lambda m, a, out: seen.append((out != a[0]).any(-1)))
    return seen


@pytest.mark.parametrize("component", ["block_output", "attention_input", "mlp_input"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_reads_its_whole_input_as_prompt(name, component, tmp_path):
    torch.manual_seed(0)
    base = AutoModel.from_config(config(name, {**SIZES, **ENCODERS[name]})).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        plain = base(ids, attention_mask=mask)[0]
    settings = {"positions": "f1+l2", "layers": "all", "component": component}
    model = get_reft_model(base, ReftConfig(**settings, init_weights=False)).eval()
    seen = spy(model)
    with torch.no_grad():
        edited = model(ids, attention_mask=mask)[0]
        assert not torch.allclose(edited, plain)
        assert [s.int().tolist() for s in seen] == [[[1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]]] * 4
        alone = model(ids[1:, :3], attention_mask=mask[1:, :3])[0]
        torch.testing.assert_close(alone[0], edited[1, :3], atol=1e-5, rtol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(ids, attention_mask=mask)[0], plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids, attention_mask=mask)[0], edited)


def test_token_labels_are_no_prompt_boundary():
    torch.manual_seed(0)
    base = AutoModelForTokenClassification.from_config(config("bert", SIZES))
    model = get_reft_model(base, ReftConfig(positions="l1", init_weights=False, task_type="TOKEN_CLS"))
    seen = spy(model)
    labels = torch.tensor([[-100, 1, 0, 1, -100]])
    model(torch.tensor([[5, 6, 7, 8, 9]]), attention_mask=torch.ones(1, 5), labels=labels).loss.backward()
    assert seen[0].int().tolist() == [[0, 0, 0, 0, 1]]
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any(".reft_" in n for n in trained)
    assert all(".reft_" in n or "modules_to_save" in n for n in trained)


@pytest.mark.parametrize("name", BOTH)
def test_an_encoder_decoder_is_edited_in_its_encoder(name):
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(
        config(name, {**BOTH[name], "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 98})
    ).eval()
    model = get_reft_model(base, ReftConfig(positions="f1+l2", init_weights=False, task_type="SEQ_2_SEQ_LM"))
    model.eval()
    seen = spy(model)
    ids = torch.tensor([[5, 6, 7, 8, 9, 98], [11, 12, 98, 0, 0, 0]])
    mask = (ids != 0).long()
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    expected = [[1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert [s.int().tolist() for s in seen] == [expected]
    alone = model.generate(input_ids=ids[1:, :3], max_new_tokens=4, do_sample=False)
    assert alone[0].tolist() == out[1, : alone.shape[1]].tolist()
    seen.clear()
    model.train()
    model(input_ids=ids, attention_mask=mask, labels=torch.tensor([[4, 5, 6], [7, 8, -100]])).loss.backward()
    assert [s.int().tolist() for s in seen] == [expected]
    with pytest.raises(RuntimeError, match="is the base model: it carries a ReFT adapter"):
        base(input_ids=ids, attention_mask=mask, labels=torch.tensor([[4, 5, 6], [7, 8, -100]]))
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="was loaded for inference or frozen"):
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor([[4, 5, 6], [7, 8, -100]]))
    path = "decoder.block.1.output" if name == "t5" else "model.decoder.layers.1.output"
    with pytest.raises(ValueError, match="decoder of an encoder-decoder"):
        get_reft_model(model.unload(), ReftConfig(component=path, positions="l1"))


def test_choices_are_padded_rows_each():
    torch.manual_seed(0)
    base = AutoModelForMultipleChoice.from_config(config("bert", SIZES))
    model = get_reft_model(base, ReftConfig(r=2, layers="all", positions="f2+l2", init_weights=False)).eval()
    rows = [[[2, 5, 6, 7], [2, 8, 9, 10, 11, 12]], [[2, 13, 14], [2, 15, 16, 17, 18]]]
    ids = torch.tensor([[row + [0] * (6 - len(row)) for row in choices] for choices in rows])
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
        alone = [[model(input_ids=torch.tensor([[row]])).logits.item() for row in choices] for choices in rows]
    torch.testing.assert_close(padded, torch.tensor(alone), atol=1e-6, rtol=1e-5)


VISION = {
    "vit": ({"image_size": 8, "patch_size": 4, "num_channels": 3}, {"pixel_values": torch.zeros(2, 3, 8, 8)}, 5),
    "clip_vision_model": ({"image_size": 8, "patch_size": 4}, {"pixel_values": torch.zeros(2, 3, 8, 8)}, 5),
    "dinov2": ({"image_size": 8, "patch_size": 4, "mlp_ratio": 2}, {"pixel_values": torch.zeros(2, 3, 8, 8)}, 5),
}


@pytest.mark.parametrize("name", VISION)
def test_images_have_their_tokens_counted_at_the_first_block(name):
    settings, inputs, tokens = VISION[name]
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "pad_token_id", "max_position_embeddings")}
    base = AutoModel.from_config(config(name, {**sizes, **settings})).eval()
    model = get_reft_model(base, ReftConfig(positions="f1+l1", layers="all", init_weights=False)).eval()
    seen = spy(model)
    with torch.no_grad():
        model(**inputs)
    assert [s.int().tolist() for s in seen] == [[[1] + [0] * (tokens - 2) + [1]] * 2] * 4


SPEECH = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
SPEECH |= {"conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [4, 2], "num_conv_pos_embeddings": 4}
SPEECH |= {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "mask_time_prob": 0.0, "vocab_size": 20}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's own
@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "wavlm", "unispeech"])
def test_padding_of_audio_is_no_frame(name):
    torch.manual_seed(0)
    base = AutoModelForCTC.from_config(config(name, SPEECH)).eval()
    model = get_reft_model(base, ReftConfig(positions="f1+l2", layers="all", init_weights=False)).eval()
    seen = spy(model)
    audio = torch.randn(2, 64)
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 44:] = 0  # 7 frames, and 4
    with torch.no_grad():
        model(audio, attention_mask=mask)
    assert [s.int().tolist() for s in seen] == [[[1, 0, 0, 0, 0, 1, 1], [1, 0, 1, 1, 0, 0, 0]]] * 4
    with torch.no_grad():
        model(audio)  # no mask, no padding
    assert seen[-1].int().tolist() == [[1, 0, 0, 0, 0, 1, 1]] * 2


def test_padding_of_audio_is_no_frame_of_an_encoder_decoder():
    torch.manual_seed(0)
    settings = {**BOTH["bart"], "num_conv_layers": 1, "conv_kernel_sizes": [3], "conv_channels": 16, "pad_token_id": 0}
    settings |= {"input_feat_per_channel": 8, "max_source_positions": 64, "max_target_positions": 64}
    base = Speech2TextForConditionalGeneration(config("speech_to_text", settings)).eval()
    model = get_reft_model(base, ReftConfig(positions="f1+l1", init_weights=False)).eval()
    seen = spy(model)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])  # 4 frames, and 3
    inputs = {"input_features": torch.randn(2, 8, 8), "attention_mask": mask}
    with torch.no_grad():
        model(**inputs, decoder_input_ids=torch.tensor([[2], [2]]))
        model.generate(**inputs, max_new_tokens=2)
    assert [s.int().tolist() for s in seen] == [[[1, 0, 0, 1], [1, 0, 1, 0]]] * 2


def test_a_multimodal_model_is_edited_in_its_language_model():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = CONFIG_MAPPING["llama"](**{**SIZES, "num_key_value_heads": 2})
    vision = CONFIG_MAPPING["clip_vision_model"](
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4
    )
    base = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=97)).eval()
    model = get_reft_model(base, ReftConfig(positions="f1+l1", init_weights=False, task_type="CAUSAL_LM")).eval()
    assert any("language_model.layers.2.edit_output" in n for n, _ in model.named_modules())
    seen = spy(model)
    ids = torch.tensor([[5, 97, 97, 97, 97, 6, 7]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 8, 8), max_new_tokens=3,
        do_sample=False,
    )  # fmt: skip
    assert out.shape[1] <= 10
    assert seen[0].int().tolist() == [[1, 0, 0, 0, 0, 0, 1]]
    assert not any(s.any() for s in seen[1:])
