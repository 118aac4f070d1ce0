"""Every way to generate edits the same tokens: the ways that peers break, on a tiny Llama."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, StaticCache, pipeline

from conftest import tiny_llama
from reference import greedy, logits
from reftune import ReftConfig, get_reft_model
from reftune.interventions import Intervention
from reftune.positions import NoPromptError
from reftune.tuner.caches import cache_name, cache_of

EXPRESSIONS = ["f2+l2", "l2", "l1+gen", "all", "prompt+gen/2", "gen:2"]


def adapted(positions: str = "f2+l2", seed: int = 0, base=None, **settings):
    settings = {"layers": [1, 2], "init_weights": False, "task_type": "CAUSAL_LM", **settings}
    model = get_reft_model(
        tiny_llama(dtype=torch.float64, seed=seed) if base is None else base,
        ReftConfig(positions=positions, **settings),
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Intervention):
                for key, parameter in module.named_parameters():
                    if key != "R":
                        parameter.add_(torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model.eval()


CACHE = cache_name(tiny_llama())  # as the installed transformers calls it
PROMPTS = [[5, 9, 3, 77, 8, 41, 6, 12], [14, 2, 60]]


def batch() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def wanted(model, new: int = 6) -> list[list[int]]:
    return [greedy(model, p, new)[0] for p in PROMPTS]


@pytest.mark.parametrize("positions", EXPRESSIONS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 3},
        {"num_beams": 1, "num_return_sequences": 1},
    ],
    ids=["cache", "no-cache", "static", "chunked", "plain"],
)
def test_greedy(positions, how):
    model = adapted(positions)
    out = model.generate(**batch(), max_new_tokens=6, do_sample=False, **how)
    assert out[:, 8:].tolist() == wanted(model)


@pytest.mark.parametrize("positions", EXPRESSIONS)
def test_a_static_cache_whose_first_row_is_padded(positions):
    # transformers 5.0 counts what a static cache holds by the keys of its first row that are not zero, and the
    # embedding of a padding token is zero
    model, data = adapted(positions), {name: tensor.flip(0) for name, tensor in batch().items()}
    settings = {"cache_implementation": "static", "disable_compile": True}
    out = model.generate(**data, max_new_tokens=6, do_sample=False, **settings)
    assert out[:, 8:].tolist() == wanted(model)[::-1]


@pytest.mark.parametrize("positions", EXPRESSIONS)
def test_right_padded_prompts(positions):
    model = adapted(positions)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in PROMPTS])
    mask = (ids != 0).long()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=position_ids, **{CACHE: cache})
        token = torch.stack([out.logits[i, len(p) - 1].argmax() for i, p in enumerate(PROMPTS)])
        found = [token]
        for step in range(4):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            place = torch.tensor([[len(p) + step] for p in PROMPTS])
            out = model(token[:, None], attention_mask=mask, position_ids=place, **{CACHE: cache})
            token = out.logits[:, -1].argmax(-1)
            found.append(token)
    assert torch.stack(found, 1).tolist() == wanted(model, 5)


@pytest.mark.parametrize("positions", EXPRESSIONS)
@pytest.mark.parametrize("how", ["assisted", "prompt_lookup"])
def test_drafted_tokens(positions, how):
    model = adapted(positions)
    one = torch.tensor([PROMPTS[0]])
    drafts = {"prompt_lookup_num_tokens": 2}
    if how == "assisted":
        drafts = {"assistant_model": tiny_llama(layers=1, dtype=torch.float64)}
        drafts["assistant_model"].generation_config.eos_token_id = None
    out = model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=6, do_sample=False, **drafts)
    assert out[0, 8:].tolist() == greedy(model, PROMPTS[0], 6)[0]


def test_beams_and_sampling_follow_the_same_logits():
    model = adapted("l2+gen")
    out = model.generate(
        **batch(), max_new_tokens=5, num_beams=3, num_return_sequences=3, do_sample=False,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i, row in enumerate(out.sequences):
        prompt, answer = PROMPTS[i // 3], row[8:].tolist()
        exact = logits(model, prompt + answer, len(prompt)).log_softmax(-1)
        score = sum(exact[len(prompt) - 1 + k, token] for k, token in enumerate(answer)) / len(answer)
        torch.testing.assert_close(out.sequences_scores[i].double(), score, atol=1e-5, rtol=1e-5)
    sampled = model.generate(
        **batch(), max_new_tokens=5, do_sample=True, num_return_sequences=2, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    for i, row in enumerate(sampled.sequences):
        prompt, answer = PROMPTS[i // 2], row[8:].tolist()
        exact = logits(model, prompt + answer, len(prompt))[len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack([s[i] for s in sampled.logits]).double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["f2", "prompt", "all"])
def test_continuing_from_a_cache(positions):
    """Turn 2 of a chat on turn 1's cache: the prompt is all that was said, and only new tokens are edited."""
    model = adapted(positions)
    first = torch.tensor([PROMPTS[0]])
    cache = DynamicCache(config=model.config)
    out = model.generate(first, attention_mask=torch.ones_like(first), **{CACHE: cache}, max_new_tokens=4,
                         do_sample=False)  # fmt: skip
    second = torch.cat([out, torch.tensor([[33, 44, 55]])], 1)
    mask = torch.ones_like(second)
    continued = model.generate(second, attention_mask=mask, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
    assert continued.shape == (1, second.shape[1] + 4)
    if positions in ("f2", "all"):  # what the cache holds is what a fresh reading gives
        fresh = model.generate(second, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert torch.equal(continued, fresh)


def test_decoding_by_hand_and_with_a_static_cache():
    for cache in (DynamicCache(config=adapted().config), StaticCache(config=adapted().config, max_cache_len=32)):
        model = adapted("f1+l1+gen:2")
        ids = torch.tensor([PROMPTS[0]])
        found = []
        with torch.no_grad():
            out = model(ids, **{CACHE: cache}, use_cache=True)
            for _ in range(5):
                token = out.logits[:, -1:].argmax(-1)
                found.append(int(token))
                out = model(token, **{CACHE: cache}, use_cache=True)
        assert found == greedy(model, PROMPTS[0], 5)[0]


def test_a_cache_made_by_the_model_remembers_the_prompt():
    model = adapted("l1+gen:2")
    with torch.no_grad():
        out = model(torch.tensor([PROMPTS[0]]), use_cache=True)
        first = int(out.logits[0, -1].argmax())
        out = model(torch.tensor([[first]]), **{CACHE: cache_of(out)})
    assert [first, int(out.logits[0, -1].argmax())] == greedy(model, PROMPTS[0], 2)[0]


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("positions", ["f1", "f2+l2", "prompt+gen", "all"])
@pytest.mark.parametrize("rows", [1, 2])
def test_blocks_that_see_the_last_token_of_a_prompt_alone(positions, rows):
    """Those of Gemma 4 that share the keys of others, where `generate` asks for the last token's logits."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gemma4_text"](
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, global_head_dim=8, vocab_size=99, vocab_size_per_layer_input=99, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=6,
        pad_token_id=0, bos_token_id=1, eos_token_id=98,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).double()
    model = adapted(positions, base=base, layers="all")
    prompts = PROMPTS[:rows]
    inputs = {key: value[:rows] for key, value in batch().items()}
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == [greedy(model, prompt, 5)[0] for prompt in prompts]


def test_inputs_embeds_equal_ids():
    model = adapted("f2+l2+gen")
    data = batch()
    embeds = model.get_input_embeddings()(data["input_ids"])
    out = model.generate(inputs_embeds=embeds, attention_mask=data["attention_mask"], max_new_tokens=5, do_sample=False)
    assert out.tolist() == wanted(model, 5)


def test_the_base_model_generates_with_the_adapter_too():
    model = adapted()
    out = model.get_base_model().generate(**batch(), max_new_tokens=6, do_sample=False)
    assert out[:, 8:].tolist() == wanted(model)


def test_decode_steps_touch_nothing(monkeypatch):
    model = adapted("f2+l2")
    calls = []
    original = Intervention.forward
    monkeypatch.setattr(Intervention, "forward", lambda self, *a: (calls.append(1), original(self, *a))[1])
    model.generate(**batch(), max_new_tokens=6, do_sample=False)
    assert len(calls) == 4  # two layers, two terms, in the prefill alone


def test_each_row_its_own_adapter():
    model = adapted("f2+l2")
    torch.manual_seed(9)
    other = ReftConfig(positions="l1+gen", layers="all", r=2, init_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("other", other)
    rows = {"input_ids": torch.tensor([PROMPTS[0]] * 3), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    names = ["default", "__base__", "other"]
    out = model.generate(**rows, adapter_names=names, max_new_tokens=5, do_sample=False)[:, 8:].tolist()
    assert out[0] == greedy(model, PROMPTS[0], 5)[0]
    for name, row in zip(names, out, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(rows["input_ids"][:1], max_new_tokens=5, do_sample=False)
        else:
            model.set_adapter(name)
            alone = model.generate(rows["input_ids"][:1], max_new_tokens=5, do_sample=False)
        assert alone[0, 8:].tolist() == row, name
    with pytest.raises(ValueError, match="non-existing"):
        model.generate(**rows, adapter_names=["default", "no", "other"])


def test_an_exception_in_a_forward_leaves_nothing_behind():
    model = adapted("l2")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(IndexError):
            model(torch.tensor([[5, 10**6]]))
        with pytest.raises(IndexError):
            model.generate(torch.tensor([[5, 10**6]]), max_new_tokens=2)
        with pytest.raises(NoPromptError, match="leave no prompt"):
            model(ids, labels=ids)
        assert torch.equal(model(ids).logits, before)
        assert model.base_model.session.batch is None


def test_prompts_shorter_than_the_positions():
    model = adapted("f7+l7")
    for prompt in ([5], [5, 6], [5, 6, 7]):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)
        assert out[0, len(prompt) :].tolist() == greedy(model, prompt, 3)[0]


def test_threads_generate_apart():
    from concurrent.futures import ThreadPoolExecutor

    model = adapted("l2+gen:3")
    expected = [greedy(model, p, 6)[0] for p in PROMPTS]

    def run(i: int) -> list[int]:
        prompt = PROMPTS[i % 2]
        return model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(8))) == [expected[i % 2] for i in range(8)]


def test_a_copy_of_the_model_edits_with_its_own_adapter():
    import copy

    model = adapted("l2")
    ids = torch.tensor([PROMPTS[0]])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(ids).logits
        for module in twin.modules():
            if isinstance(module, Intervention):
                module.b.add_(3.0)
        assert torch.equal(model(ids).logits, before)
        assert not torch.allclose(twin(ids).logits, before)
    assert twin.generate(ids, max_new_tokens=3, do_sample=False)[0, 8:].tolist() == greedy(twin, PROMPTS[0], 3)[0]


def test_pipeline_and_hidden_states():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = adapted("l2")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")
    pipe = pipeline("text-generation", model=model, tokenizer=fast, device="cpu")
    texts = [" ".join(f"w{t}" for t in p) for p in PROMPTS]
    made = pipe(texts, max_new_tokens=4, do_sample=False, return_full_text=False, batch_size=2)
    assert [fast(m[0]["generated_text"])["input_ids"] for m in made] == wanted(model, 4)
    with torch.no_grad():
        states = model(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states
        with model.disable_adapter():
            plain = model(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states
    changed = (states[2] - plain[2]).abs().sum(-1)[0] > 0
    assert changed.tolist() == [False] * 6 + [True] * 2  # the recorded states are the edited ones
