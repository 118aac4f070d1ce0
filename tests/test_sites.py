"""Sites on tiny random models: blocks and components found by structure, and refusals that name what would do."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    HubertConfig,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from reftune.sites import Site, Where, find_blocks, find_sites, number_ranges, select_layers

_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 31,
}


def test_layer_numbers_for_people() -> None:
    assert number_ranges([5, 0, 1, 2, 8, 7, 7]) == "0-2, 5, 7-8"
    assert number_ranges([3]) == "3"
    assert number_ranges([]) == ""


def llama(layers: int = 3) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**_LLAMA, num_hidden_layers=layers))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**_LLAMA, num_hidden_layers=3, num_local_experts=2))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=3, vocab_size=31, n_positions=32))


def bert() -> BertForSequenceClassification:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    return BertForSequenceClassification(BertConfig(**shape, vocab_size=31))


def opt() -> OPTForCausalLM:
    shape = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    return OPTForCausalLM(OPTConfig(**shape, vocab_size=31, word_embed_proj_dim=16))


def bloom() -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(hidden_size=16, n_head=2, n_layer=3, vocab_size=31))


def mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=3, vocab_size=31))


def t5() -> T5ForConditionalGeneration:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 3, "num_decoder_layers": 2}
    return T5ForConditionalGeneration(T5Config(**shape, vocab_size=31))


def vit() -> ViTForImageClassification:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4))


def llava() -> LlavaForConditionalGeneration:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**shape, num_hidden_layers=5, image_size=8, patch_size=4)  # deeper than the text's
    text = LlamaConfig(**_LLAMA, num_hidden_layers=3)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=30))


FAMILIES = {
    # family: (model, block, attention, feed-forward)
    "llama": (llama, "model.layers.{}", "self_attn", "mlp"),
    "mixtral": (mixtral, "model.layers.{}", "self_attn", "mlp"),
    "gpt2": (gpt2, "transformer.h.{}", "attn", "mlp"),
    "bert": (bert, "bert.encoder.layer.{}", "attention", None),
    "opt": (opt, "model.decoder.layers.{}", "self_attn", None),
    "bloom": (bloom, "transformer.h.{}", "self_attention", "mlp"),
    "mamba": (mamba, "backbone.layers.{}", None, None),
    "t5": (t5, "encoder.block.{}", "layer.0.SelfAttention", "layer.1.DenseReluDense"),
    "vit": (vit, "vit.layers.{}", "attention", "mlp"),
    "llava": (llava, "model.language_model.layers.{}", "self_attn", "mlp"),
}


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("mid", 30, [15]),
        ("mid", 7, [3]),
        ("mid", 1, [0]),
        ("all", 3, [0, 1, 2]),
        (0, 4, [0]),
        (3, 4, [3]),
        (-1, 4, [3]),
        (-4, 4, [0]),
        ([2, 0], 4, [0, 2]),
        ([-1, 3, 1], 4, [1, 3]),
        ((1, 2), 4, [1, 2]),
        (range(2), 4, [0, 1]),
        ("3;9", 12, [3, 9]),
        ("3, 9", 12, [3, 9]),
        ("[3, -1]", 12, [3, 11]),
        ("5", 12, [5]),
        ("50%-70%", 30, list(range(15, 22))),
        ("50% - 70%", 10, [5, 6, 7]),
        ("0%-100%", 4, [0, 1, 2, 3]),
        ("33.4%-50%", 12, [5, 6]),
        ("0%-0%", 4, [0]),
    ],
)
def test_layers(layers: object, depth: int, expected: list[int]) -> None:
    assert select_layers(layers, depth) == expected


@pytest.mark.parametrize("layers", [4, -5, [0, 99], "3;9"])
def test_a_layer_that_the_model_does_not_have(layers: object) -> None:
    with pytest.raises(ValueError, match=r"the model has 4 layers, 0 to 3 \(or -4 to -1\), so there is no layer"):
        select_layers(layers, 4)


@pytest.mark.parametrize("layers", ["", "middle", "3-9", "50%", "50-70%", "1.2.3%-5%", "3;x"])
@pytest.mark.parametrize("wrap", [str, lambda text: [text]], ids=["alone", "in a list"])
def test_text_that_names_no_layers(layers: str, wrap: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"names no layers. Use 'mid', 'all', a list of numbers, or .*'50%-70%'"):
        select_layers(wrap(layers), 4)


@pytest.mark.parametrize("layers", [[], None, True, [True], 1.5, [1.5], ["1"], {"layer": 1}])
def test_what_names_no_layers(layers: object) -> None:
    with pytest.raises(ValueError, match=r"names no layers. Use 'mid', 'all', a list of numbers, or .*'50%-70%'"):
        select_layers(layers, 4)


@pytest.mark.parametrize("layers", ["70%-50%", "51%-52%", "100%-100%"])
def test_a_range_without_a_layer(layers: str) -> None:
    with pytest.raises(ValueError, match="holds no layer of a model with 4: widen the range"):
        select_layers(layers, 4)


# -- blocks and components --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_by_structure(family: str) -> None:
    build, block, _, _ = FAMILIES[family]
    model = build()
    assert find_blocks(model) == [block.format(i) for i in range(3)]
    assert find_sites(model, "mid", "block_output") == [Site(block.format(1), "output", 1)]
    assert find_sites(model, [-1, 0], "block_input") == [
        Site(block.format(0), "input", 0),
        Site(block.format(2), "input", 2),
    ]


@pytest.mark.parametrize("where", ["output", "input"])
@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_components_are_found_or_refused_with_the_children_that_would_do(family: str, part: str, where: Where) -> None:
    build, block, *parts = FAMILIES[family]
    model, name = build(), parts[part == "mlp"]
    if family == "bert" and (part, where) == ("mlp", "input"):
        name = "intermediate"  # its feed-forward is no module of its own, but what reads its input is one
    if name is not None:
        expected = Site(f"{block.format(2)}.{name}", where, 2)
        assert find_sites(model, 2, f"{part}_{where}") == [expected]
        model.get_submodule(expected.path)
        return
    with pytest.raises(ValueError, match=f"component='{part}_{where}': looked for the one child") as error:
        find_sites(model, 2, f"{part}_{where}")
    child = next(name for name, _ in model.get_submodule(block.format(2)).named_children())
    candidate = f"{block.format(2)}.{child}.{where}"
    assert f"'{candidate}'" in str(error.value)
    assert find_sites(model, 0, candidate) == [Site(f"{block.format(2)}.{child}", where, 2)]


def test_the_inner_model_and_a_bare_one_will_do() -> None:
    assert find_blocks(llama().model) == ["layers.0", "layers.1", "layers.2"]
    assert find_blocks(t5().encoder) == ["block.0", "block.1", "block.2"]


def test_layer_1_is_not_layer_11() -> None:
    model = llama(12)
    assert [site.path for site in find_sites(model, 1, "block_output")] == ["model.layers.1"]
    assert [site.path for site in find_sites(model, 1, "mlp_output")] == ["model.layers.1.mlp"]
    assert [site.layer for site in find_sites(model, "all", "block_output")] == list(range(12))


def test_blocks_are_found_under_a_swapped_class() -> None:
    """FSDP2 and gradient checkpointing put a subclass of another name in place of the block's class."""
    model = bloom()
    for block in model.transformer.h:
        block.__class__ = type("Swapped", (type(block),), {})
    assert find_blocks(model) == [f"transformer.h.{i}" for i in range(3)]


def test_the_layers_are_as_many_as_the_config_says() -> None:
    """HuBERT has more convolutions than layers, once distilled; a masked autoencoder's decoder has fewer."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    speech = {"conv_dim": (8,) * 3, "conv_kernel": (3,) * 3, "conv_stride": (2,) * 3, "num_feat_extract_layers": 3}
    speech |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    hubert = HubertModel(HubertConfig(**shape, **speech, num_hidden_layers=2))
    assert find_blocks(hubert) == ["encoder.layers.0", "encoder.layers.1"]
    decoder = {f"decoder_{key}": value for key, value in shape.items()} | {"decoder_num_hidden_layers": 1}
    images = {"image_size": 8, "patch_size": 4}
    autoencoder = ViTMAEForPreTraining(ViTMAEConfig(**shape, **decoder, **images, num_hidden_layers=3))
    assert len(find_blocks(autoencoder)) == 3
    assert all(path.startswith("vit.") for path in find_blocks(autoencoder))


def test_a_list_inside_a_block_is_no_list_of_blocks() -> None:
    """Experts or sub-layers may be checkpointed by themselves, and be more than the blocks."""

    class Block(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(GradientCheckpointingLayer() for _ in range(5))

    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(2))
    assert find_blocks(model) == ["blocks.0", "blocks.1"]


# -- raw paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "site"),
    [
        ("model.layers[2].mlp.output", Site("model.layers.2.mlp", "output", 2)),
        ("model.layers.2.mlp.down_proj.input", Site("model.layers.2.mlp.down_proj", "input", 2)),
        ("model.embed_tokens.output", Site("model.embed_tokens", "output", None)),
        ("model.layers[0].output", Site("model.layers.0", "output", 0)),
    ],
)
def test_raw_paths_as_in_pyreft(component: str, site: Site) -> None:
    assert find_sites(llama(), "all", component) == [site]
    assert str(site) == component.replace("[", ".").replace("]", "")


def test_a_path_inside_the_blocks_is_a_site_of_each_layer() -> None:
    model = llama()
    found = find_sites(model, [0, 2], "mlp.down_proj.input")
    assert found == [Site(f"model.layers.{i}.mlp.down_proj", "input", i) for i in (0, 2)]
    assert find_sites(model, "all", "mlp.output") == find_sites(model, "all", "mlp_output")
    with pytest.raises(ValueError, match=r"has no module 'mlp.dwn_proj'.*mlp.down_proj"):
        find_sites(model, "all", "mlp.dwn_proj.input")
    with pytest.raises(ValueError, match=r"has no module 'layers.2.mlp'"):
        find_sites(model, "all", "layers[2].mlp.output")


def test_a_path_that_only_some_blocks_have_names_those_layers() -> None:
    model = llama()
    del model.model.layers[1].mlp
    with pytest.raises(ValueError, match=r"the layers 1 have no 'mlp.down_proj'. These have: \[0, 2"):
        find_sites(model, "all", "mlp.down_proj.input")
    assert len(find_sites(model, [0, 2], "mlp.down_proj.input")) == 2


def test_a_list_in_every_block_is_no_place_to_edit() -> None:
    model = llama()
    for block in model.model.layers:
        block.extra = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"'model.layers.0.extra' is a ModuleList; name a member"):
        find_sites(model, "all", "extra.output")


def test_an_unknown_path_names_paths_near_it() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no module 'model.layers.2.mpl'.*model.layers.2.mlp"):
        find_sites(llama(), "mid", "model.layers[2].mpl.output")
    with pytest.raises(ValueError, match=r"has no module 'model.layers.9.mlp'.*model.layers"):
        find_sites(llama(), "mid", "model.layers[9].mlp.output")


@pytest.mark.parametrize("component", ["block_ouput", "blockoutput"])
def test_a_misspelt_component_is_an_error_with_the_nearest_name(component: str) -> None:
    with pytest.raises(ValueError, match=r"Unknown component .*Did you mean 'block_output'\?.*Known: block_output"):
        find_sites(llama(), "mid", component)


@pytest.mark.parametrize("component", ["", "model.layers[2].mlp", "output", ".output", None, 3])
def test_no_component_at_all(component: object) -> None:
    with pytest.raises(ValueError, match="component"):
        find_sites(llama(), "mid", component)


def test_a_list_of_modules_is_no_place_to_edit() -> None:
    with pytest.raises(ValueError, match=r"'model.layers' is a ModuleList; name a member"):
        find_sites(llama(), "mid", "model.layers.output")


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_albert_is_refused_with_the_reason() -> None:
    shape = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    model = AlbertModel(AlbertConfig(**shape, num_hidden_layers=4, vocab_size=31))
    with pytest.raises(ValueError, match=r"AlbertModel runs 4 layers with 1 physical.*share weights"):
        find_sites(model, "mid", "block_output")


def test_a_model_without_blocks_is_refused_with_modules_that_would_do() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)]))
    with pytest.raises(
        ValueError, match=r"No list of blocks was found in Sequential.*component='<path>.output'"
    ) as error:
        find_sites(model, "mid", "block_output")
    assert "0.output" in str(error.value)
    assert find_sites(model, "mid", "0.output") == [Site("0", "output", None)]


def test_finding_leaves_the_model_alone() -> None:
    model = llama()
    before = {name: id(module) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    find_sites(model, "all", "mlp_output")
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
