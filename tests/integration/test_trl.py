"""TRL's trainers with a ReftConfig: what they edit in training is what generation edits, on the same prompts."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_training import adapter, losses

from conftest import tiny_llama
from reftune import ReftConfig
from reftune.interventions.orthogonal import right_rows
from reftune.positions import NoPromptError
from reftune.tuner.batch import Rows

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.trl,
    # of TRL and transformers, about names they have changed between themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning"),
    # PEFT looks for the name of TRL's copy, "ref", in our prefix; test_dpo shows that it is saved and loaded right
    pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <eos> "
    "{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    """One token a word; the ids of tiny_llama."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(5, 98)), "<eos>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )


def words(generator: torch.Generator, low: int, high: int) -> str:
    count = int(torch.randint(low, high, (1,), generator=generator))
    return " ".join(f"w{int(i)}" for i in torch.randint(5, 98, (count,), generator=generator))


def pairs(**columns: tuple[int, int]) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(4)
    return [{name: words(generator, *bounds) for name, bounds in columns.items()} for _ in range(8)]


class Spy:
    """Notes which places of each prompt are edited, for every forward pass of a model."""

    def __init__(self, model: PeftModel) -> None:
        self.edited: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
        base = model.get_base_model()
        self.ids: Any = None
        base.register_forward_pre_hook(self._read, with_kwargs=True)
        base.model.layers[0].edit_output.register_forward_hook(self._note)

    def _read(self, module: Any, args: Any, kwargs: Any) -> None:
        self.ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def _note(self, layer: Any, args: Any, output: Any) -> None:
        batch = layer.session.batch
        if batch is None or batch.nothing or batch.places is None or batch.inputs.past:
            return
        places, ids = batch.places, self.ids.reshape(-1)
        index, segment = places.index.reshape(-1), places.segment.reshape(-1)
        rows = torch.cat([found.index for found in batch._found.values() if isinstance(found, Rows)])
        assert (index[rows] >= 0).all(), "a token outside all prompts is edited"
        for number in segment[index >= 0].unique():
            prompt = tuple(ids[(segment == number) & (index >= 0)].tolist())
            self.edited[prompt].add(tuple(sorted(index[rows][segment[rows] == number].tolist())))


def reft(**settings: Any) -> ReftConfig:
    return ReftConfig(**{"r": 2, "layers": [0, 2], "positions": "f2+l2", "task_type": "CAUSAL_LM", **settings})


def options(directory: Path, **settings: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
    }
    return {**defaults, **settings}


def assert_generation_edits_the_same(model: PeftModel, trained: dict[Any, set[tuple[int, ...]]]) -> None:
    """Generate from every prompt that was trained on, left-padded in one batch."""
    assert trained
    assert all(len(edited) == 1 for edited in trained.values())
    spy = Spy(model.eval())
    prompts = [torch.tensor(p) for p in trained]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert spy.edited == trained
    assert all(edited == places(len(prompt)) for prompt, (edited,) in trained.items())


def places(length: int) -> tuple[int, ...]:
    """f2+l2 of a prompt, by the paper's rule."""
    first, last = (2, 2) if length >= 4 else (min(2, length // 2), min(2, (length + 1) // 2))
    return tuple(sorted({*range(first), *range(length - last, length)}))


def sft(tokenizer: Any, directory: Path, data: list[Any], **settings: Any) -> Any:
    arguments = trl.SFTConfig(**options(directory, **settings))
    return trl.SFTTrainer(
        model=tiny_llama(layers=3),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=reft(),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True, "max_length": 24, "packing_strategy": "bfd"},
        {"padding_free": True, "max_length": None},
    ],
    ids=["padded", "packing", "padding_free"],
)
def test_sft_edits_the_tokens_that_generation_edits(tokenizer: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = sft(tokenizer, tmp_path, pairs(prompt=(2, 7), completion=(1, 5)), **settings)
    spy = Spy(trainer.model)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert len(spy.edited) >= 6
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".reft_" in name for name in changed)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 10_000
    assert not (tmp_path / "model.safetensors").exists()
    assert_generation_edits_the_same(trainer.model, dict(spy.edited))


def test_packed_rows_learn_what_padded_rows_learn(tokenizer: Any, tmp_path: Path) -> None:
    """Packing changes how sequences lie in a batch, not the loss of each of them."""
    data = pairs(prompt=(2, 7), completion=(1, 5))
    padded = sft(tokenizer, tmp_path, data, per_device_train_batch_size=8, max_steps=1)
    flat = sft(
        tokenizer, tmp_path, data, per_device_train_batch_size=8, max_steps=1, padding_free=True, max_length=None
    )
    for trainer in (padded, flat):
        trainer.train()
    assert losses(flat) == pytest.approx(losses(padded), rel=1e-4)
    expected = adapter(padded.model)
    for name, value in adapter(flat.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-4)


def test_sft_on_messages_without_a_mask_of_the_answers_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    data = [
        {"messages": [{"role": "user", "content": p["q"]}, {"role": "assistant", "content": p["a"]}]}
        for p in pairs(q=(2, 6), a=(2, 4))
    ]
    with pytest.raises(NoPromptError, match="assistant_only_loss=True"):
        sft(tokenizer, tmp_path, data).train()
    masked = sft(tokenizer, tmp_path, data, assistant_only_loss=True)
    spy = Spy(masked.model)
    masked.train()
    assert all(ids[0] == 3 and ids[-1] == 4 for ids in spy.edited)  # "user ... assistant"
    assert_generation_edits_the_same(masked.model, dict(spy.edited))


@pytest.mark.parametrize("beta_from", ["base", "adapter"])
def test_dpo(tokenizer: Any, tmp_path: Path, beta_from: str) -> None:
    """The reference is the model with the adapter off; for an adapter trained before, TRL's copy of it."""
    from reftune import get_reft_model

    data = pairs(prompt=(2, 7), chosen=(1, 4), rejected=(1, 5))
    model: Any = tiny_llama(layers=3)
    config: ReftConfig | None = reft(init_weights=False)
    if beta_from == "adapter":
        model, config = get_reft_model(model, config), None
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**options(tmp_path, disable_dropout=True)),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=config,
    )
    spy = Spy(trainer.model)
    first = {n: p for n, p in adapter(trainer.model).items()}
    batch = next(iter(trainer.get_train_dataloader()))
    reference = logps(tiny_llama(layers=3) if beta_from == "base" else trainer.model, batch)

    seen: list[Any] = []

    def outputs(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            seen.append(output.log_probs.clone())

    handle = trainer.model.get_base_model().register_forward_hook(outputs, with_kwargs=True)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    handle.remove()
    assert len(seen) == 1
    shifted = batch["completion_mask"][:, 1:].bool()
    torch.testing.assert_close(seen[0][:, -shifted.shape[1] :][shifted], reference[shifted], rtol=1e-4, atol=1e-5)

    trainer.train()
    now = adapter(trainer.model)
    assert any(not torch.equal(now[n], first[n]) for n in now if ".default." in n)
    assert all(torch.equal(now[n], first[n]) for n in now if ".ref." in n)
    assert trainer.model.active_adapter == "default"
    assert trainer.model.get_base_model().model.layers[0].edit_output.active_adapters == ["default"]
    trainer.save_model()
    for name in trainer.model.peft_config:
        directory = tmp_path / ("" if name == "default" else name)
        loaded = adapter(PeftModel.from_pretrained(tiny_llama(layers=3), str(directory)))
        mine = {n.replace(f".{name}.", ".default."): v for n, v in now.items() if f".{name}." in n}
        assert loaded.keys() == mine.keys()
        for key, value in mine.items():  # R was last touched by the optimiser: it is put right when it is saved
            assert torch.equal(loaded[key], right_rows(value) if key.endswith(".R") else value)
    assert_generation_edits_the_same(trainer.model, dict(spy.edited))


def logps(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Log-probability of each token from the second on, by a plain forward with the labels of the answers."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        logits = model.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)


def test_grpo(tokenizer: Any, tmp_path: Path) -> None:
    """Prompts are edited alike where it samples, where it scores the samples, and where it learns from them."""
    torch.manual_seed(0)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text.split()))) + 0.1 * len(text) for text in completions]

    trainer = trl.GRPOTrainer(
        model=tiny_llama(layers=3),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            **options(tmp_path, max_steps=2, num_generations=2, max_completion_length=5, beta=0.1, temperature=1.0)
        ),
        train_dataset=datasets.Dataset.from_list(pairs(prompt=(2, 7))),
        processing_class=tokenizer,
        peft_config=reft(),
    )
    spy = Spy(trainer.model)
    before = adapter(trainer.model)
    trainer.train()
    after = adapter(trainer.model)
    assert any(not torch.equal(after[n], before[n]) for n in after)
    assert len(spy.edited) >= 2
    assert_generation_edits_the_same(trainer.model, dict(spy.edited))
