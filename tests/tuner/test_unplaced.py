"""Passes that do not say where a prompt ends: guidance's second sequence, continuous batching."""

import pytest
import torch
import transformers
from transformers import GenerationConfig

import reftune
from conftest import tiny_llama
from reference import greedy, logits
from reftune import ReftConfig, get_reft_model
from reftune.interventions import Intervention
from reftune.tuner.caches import cache_name

PROMPTS = [[5, 9, 3, 77, 8, 41, 6, 12], [14, 2, 60], [7, 7, 31], [9, 1, 4, 28, 70]]


def adapted(positions: str = "f2+l2", dtype: torch.dtype = torch.float64, **settings):
    model = get_reft_model(tiny_llama(dtype=dtype), config(positions, **settings))
    shake(model)
    model.generation_config.eos_token_id = None
    return model.eval()


def config(positions: str, **settings) -> ReftConfig:
    return ReftConfig(positions=positions, layers=[1, 2], init_weights=False, task_type="CAUSAL_LM", **settings)


@torch.no_grad()
def shake(model) -> None:
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, Intervention):
            for key, parameter in module.named_parameters():
                if key != "R":
                    parameter.add_(torch.randn_like(parameter))


# -- guidance ---------------------------------------------------------------------------------------------------------


def guided(model, prompt: list[int], negative: list[int], scale: float, new: int) -> list[int]:
    """Guided greedy decoding by brute force: both sequences read afresh for each token, each with its own prompt."""
    answer: list[int] = []
    for _ in range(new):
        found, other = (logits(model, start + answer, len(start))[-1].log_softmax(-1) for start in (prompt, negative))
        answer.append(int((other + scale * (found - other)).argmax()))
    return answer


@pytest.mark.parametrize("positions", ["f2+l2", "l2", "l1+gen", "all", "prompt+gen/2", "gen:2"])
@pytest.mark.parametrize("negative", [None, [33, 4], [3, 1, 4, 1, 5, 9, 2, 6, 53, 58]], ids=["last", "short", "long"])
def test_guidance_edits_each_sequence_by_its_own_prompt(positions, negative):
    model, prompt = adapted(positions), PROMPTS[0]
    more = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative])}
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, guidance_scale=1.7, **more
    )
    assert out[0, len(prompt) :].tolist() == guided(model, prompt, negative or prompt[-1:], 1.7, 6)
    with torch.no_grad():  # and nothing of it is left for what comes after
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert plain[0, len(prompt) :].tolist() == greedy(model, prompt, 6)[0]


def test_guidance_of_padded_rows():
    model = adapted("f2+l2+gen")
    ids = torch.tensor([PROMPTS[0], [0] * 5 + PROMPTS[1]])
    negative = torch.tensor([[33, 4, 81], [0, 0, 17]])
    out = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=5,
        do_sample=False,
        guidance_scale=0.6,
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=(negative != 0).long(),
    )
    for row, prompt, other in zip(out, PROMPTS, ([33, 4, 81], [17]), strict=False):
        assert row[8:].tolist() == guided(model, prompt, other, 0.6, 5)


@pytest.mark.parametrize(
    "how", [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}], ids=["static", "chunked"]
)
def test_guidance_over_other_caches(how):
    model, ids = adapted("f2+l2+gen:2"), torch.tensor([PROMPTS[0]])
    settings = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True, **how}
    negative = {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[33, 4, 81]])}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **negative)
    assert out[0, 8:].tolist() == guided(model, PROMPTS[0], [33, 4, 81], 1.7, 5)


def test_guidance_of_rows_with_adapters_of_their_own():
    model, settings = adapted("l2+gen"), {"max_new_tokens": 5, "do_sample": False, "guidance_scale": 1.7}
    ids = torch.tensor([PROMPTS[0]])
    out = model.generate(ids.repeat(2, 1), adapter_names=["__base__", "default"], **settings)
    assert out[1, 8:].tolist() == guided(model, PROMPTS[0], PROMPTS[0][-1:], 1.7, 5)
    with model.disable_adapter():
        assert out[0].tolist() == model.generate(ids, **settings)[0].tolist() != out[1].tolist()


@pytest.mark.parametrize("how", ["argument", "generation_config", "model", "both"])
def test_guidance_without_a_cache_is_refused(how):
    model, ids = adapted("l2"), torch.tensor([PROMPTS[0]])
    settings = {"guidance_scale": 1.7, "use_cache": False}
    if how == "generation_config":
        settings = {"generation_config": GenerationConfig(max_new_tokens=2, **settings)}
    elif how == "model":
        model.generation_config.update(**settings)
        settings = {}
    elif how == "both":
        model.generation_config.guidance_scale = settings.pop("guidance_scale")
        settings = {"generation_config": GenerationConfig(max_new_tokens=2, **settings)}
    with pytest.raises(ValueError, match=r"without a cache.*'default' has positions='l2'.*positions='all'"):
        model.generate(ids, do_sample=False, **settings)
    with model.disable_adapter():
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == 10


def test_guidance_without_a_cache_edits_every_token():
    model, prompt = adapted("all"), PROMPTS[0]
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=4, do_sample=False, guidance_scale=1.7, use_cache=False)
    assert out[0, 8:].tolist() == guided(model, prompt, prompt[-1:], 1.7, 4)


# -- continuous batching ----------------------------------------------------------------------------------------------


CONFIG = getattr(transformers, "ContinuousBatchingConfig", None)
runs = pytest.mark.skipif(CONFIG is None, reason="transformers 5.0 batches continuously on a GPU alone")


def batched(model) -> list[list[int]]:
    """The answers of `generate_batch`, few tokens a pass: prompts arrive in pieces and beside others' answers."""
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    few = {} if CONFIG is None else {"continuous_batching_config": CONFIG(num_blocks=16, max_batch_tokens=5)}
    made = model.generate_batch(PROMPTS, generation_config=GenerationConfig(**settings), progress_bar=False, **few)
    assert [one.error for one in made.values()] == [None] * len(PROMPTS)
    return [list(one.generated_tokens) for one in made.values()]


def one_by_one(model) -> list[list[int]]:
    outputs = [model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False)[0, len(p) :] for p in PROMPTS]
    return [row.tolist() for row in outputs]


@runs
@pytest.mark.parametrize("settings", [{"positions": "all"}, {"positions": "prompt+gen", "share_weights": True}])
def test_continuous_batching_edits_every_token(settings):
    model = adapted(**settings, dtype=torch.float32)
    assert batched(model) == [greedy(model, prompt, 6)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("positions", ["f2", "l2", "prompt+gen", "gen", "all+l1", "mid1"])
def test_continuous_batching_is_refused_where_prompts_matter(positions):
    model = adapted(positions, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"Continuous batching .*'default' has positions=.*generate\(\)"):
        batched(model)
    assert one_by_one(model) == [greedy(model, prompt, 6)[0] for prompt in PROMPTS]  # the model is as it was


@runs
def test_continuous_batching_of_the_base():
    model = adapted("l2", dtype=torch.float32)
    with model.disable_adapter():
        assert batched(model) == one_by_one(model)
    base = model.unload()
    assert not {"generate", "init_continuous_batching"} & set(vars(base))
    assert batched(base) == one_by_one(base)


def test_a_kind_that_couples_tokens_is_refused():
    model = adapted("all", dtype=torch.float32, intervention="reft_r1")
    with pytest.raises(ValueError, match=r"Continuous batching .*couples a prompt"):
        batched(model)


@runs
def test_a_composition_of_this_thread_alone_is_refused():
    model = adapted("all", dtype=torch.float32)
    half = reftune.compose({"default": 0.5})
    with half.on(model), pytest.raises(ValueError, match=r"in this thread.*apply"):
        batched(model)
    half.apply(model)
    assert batched(model) == one_by_one(model)


def test_a_pass_of_an_adapter_that_became_active_later_is_refused():
    class PagedAttentionCache:
        pass

    model = adapted("l2")
    with pytest.raises(ValueError, match=r"Continuous batching .*positions='l2'"):
        model(torch.tensor([PROMPTS[0]]), **{cache_name(model.get_base_model()): PagedAttentionCache()})
