"""The properties on an accelerator where there is one (else on the CPU, so that these tests cannot rot).

pytest tests/integration/test_accelerator.py
"""

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from reuse_cases import GAPS, collate, computed, examples, reft, reuse, with_reuse
from tiny_training import arguments
from torch import Tensor

from conftest import tiny_llama
from families import CAUSAL, tiny
from reftune import ReftConfig, get_reft_model, initialize_reft_weights
from reftune.interventions import orthonormality_error
from reftune.train import ReftTrainer
from reftune.train.reuse import store_near

pytestmark = [
    GAPS,
    pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation.*", "ignore:.*YaRN.*"),
]
HERE = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")
FAMILIES = [name for name in ("llama", "qwen3", "gemma3_text", "gpt2", "mistral", "gpt_oss", "phi3") if name in CAUSAL]
POSITIONS = ["f2+l2", "l1+gen", "all", "l2", "mid1+gen:2"]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
if HERE.type == "cpu":  # where the other tests say the same
    FAMILIES, POSITIONS = FAMILIES[:1], POSITIONS[:2]


def adapted(base: Any, positions: str, count: int = 1, **settings: Any) -> Any:
    """The model on the accelerator with adapters a0, a1 ... that change its output much."""
    torch.manual_seed(2)
    config = ReftConfig(r=3, positions=positions, layers="all", init_weights=False, task_type="CAUSAL_LM", **settings)
    model = get_reft_model(base.to(HERE), config, adapter_name="a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reft_" in name and not name.endswith(".R"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row if side == "left" else row + [0] * (width - len(row)) for row in rows]
    mask = [[int(token > 0) for token in row] for row in ids]
    places = (torch.tensor(mask).cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": torch.tensor(ids, device=HERE),
        "attention_mask": torch.tensor(mask, device=HERE),
        "position_ids": places.to(HERE),
    }


def asked(rows: list[list[int]]) -> dict[str, Any]:
    """Prompts as `generate` takes them: padded on the left, their positions left to it."""
    return {name: tensor for name, tensor in padded(rows, "left").items() if name != "position_ids"}


def prompts(seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(2, 90) for _ in range(length)] for length in (1, 4, 9, 6)]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padded_left_or_right_is_unpadded(name: str, positions: str) -> None:
    model, rows = adapted(tiny(name), positions), prompts(0)
    for side in ("left", "right"):
        found = model(**padded(rows, side)).logits
        for row, ids in enumerate(rows):
            own = found[row, -len(ids) :] if side == "left" else found[row, : len(ids)]
            alone = model(input_ids=torch.tensor([ids], device=HERE)).logits[0]
            torch.testing.assert_close(own.double(), alone.double(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_generation_alone_in_a_batch_with_and_without_a_cache(positions: str) -> None:
    model, rows = adapted(tiny_llama(dtype=torch.float64), positions), prompts(1)
    batch, settings = asked(rows), {"max_new_tokens": 6, **GREEDY}
    together = [model.generate(**batch, use_cache=use, **settings)[:, 9:].tolist() for use in (True, False)]
    assert together[0] == together[1]
    for row, ids in enumerate(rows):
        one = torch.tensor([ids], device=HERE)
        alone = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **settings)
        assert alone[0, len(ids) :].tolist() == together[0][row]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("positions", ["f2+l2", "all", "l1+gen/2"])
@torch.no_grad()
def test_generation_over_a_static_cache(positions: str) -> None:
    """On a GPU transformers compiles its steps by itself, into CUDA graphs; twice, for a second run replays them."""
    model, inputs = (
        adapted(tiny_llama(dtype=torch.float64), positions),
        asked(prompts(1)) | {"max_new_tokens": 12, **GREEDY},
    )
    expected = model.generate(**inputs).tolist()
    with model.disable_adapter():
        plain = model.generate(**inputs).tolist()
    assert expected != plain
    for _ in range(2):
        assert model.generate(**inputs, cache_implementation="static").tolist() == expected
    with model.disable_adapter():
        assert model.generate(**inputs, cache_implementation="static").tolist() == plain


@torch.no_grad()
def test_each_row_by_its_own_adapter_and_off_is_the_base_bit_for_bit() -> None:
    base = tiny_llama(dtype=torch.float64).to(HERE)
    ids = torch.randint(3, 90, (3, 7), device=HERE)
    plain = base(ids).logits
    model = adapted(base, "f2+l2", count=2)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    mixed = model(ids, adapter_names=["a1", "__base__", "a0"]).logits
    assert torch.equal(mixed[1], plain[1])
    for row, name in ((0, "a1"), (2, "a0")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(ids[row : row + 1]).logits[0])


def test_saved_there_and_loaded_anywhere(tmp_path: Path) -> None:
    model = adapted(tiny_llama(), "f2+l2")
    model.save_pretrained(str(tmp_path))
    ids = torch.randint(3, 90, (2, 7))
    wanted = model(ids.to(HERE)).logits.cpu()
    for device in (HERE, torch.device("cpu")):
        again = peft.PeftModel.from_pretrained(tiny_llama().to(device), str(tmp_path / "a0")).eval()
        torch.testing.assert_close(again(ids.to(device)).logits.cpu(), wanted, atol=1e-5, rtol=1e-4)
        for mine, saved in zip(_adapter(again), _adapter(model), strict=True):
            assert mine.device.type == device.type
            assert torch.equal(mine.cpu(), saved.cpu())


def _adapter(model: Any) -> list[Tensor]:
    return [p.detach() for name, p in model.named_parameters() if ".reft_" in name]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_reuse_is_the_plain_computation(name: str, positions: str) -> None:
    model = reft(tiny(name).to(HERE), positions, layers=[1])
    engine, said = reuse(model, store=store_near(HERE, 10**8))
    for seed in range(2):
        batch = {key: tensor.to(HERE) for key, tensor in collate(examples(seed=seed)).items()}
        loss, gradients = computed(model, dict(batch))
        for keep in (False, True, True):
            found = with_reuse(engine, batch, keep)
            torch.testing.assert_close(found[0], loss, atol=1e-5, rtol=1e-5)
            assert (found[1] - gradients).norm() <= 1e-4 * gradients.norm()
    assert engine.store.found >= 8
    assert {tensor.device.type for entry in engine.store.entries.values() for tensor in entry.values()} == {HERE.type}
    assert not said


@pytest.mark.parametrize("positions", ["l2", "f2+l2"])
def test_the_trainer_with_reuse_ends_where_it_ends_without(positions: str, tmp_path: Path) -> None:
    ends = []
    for way in ("auto", "off"):
        args = arguments(tmp_path / way, use_cpu=False, max_steps=-1, num_train_epochs=3, learning_rate=5e-3)
        model, lines = reft(tiny_llama().to(HERE), positions), list[str]()
        rows = examples(16)
        run = ReftTrainer(
            model=model, args=args, train_dataset=rows, data_collator=collate, reuse=way, say=lines.append
        )
        run.train()
        assert not any("switched off" in line for line in lines)
        ends.append((run.state.log_history[-2]["loss"], _adapter(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-3)
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("intervention", ["loreft", "lobireft", "consreft"])
def test_rows_stay_orthonormal_in_training(intervention: str, autocast: bool) -> None:
    model = adapted(tiny_llama(), "all", intervention=intervention).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    batch = {key: tensor.to(HERE) for key, tensor in collate(examples()).items()}
    for _ in range(10):
        with torch.autocast(HERE.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss + model(**batch).loss  # two forwards before one backward
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        model(**batch)
    rows = [p for name, p in model.named_parameters() if name.endswith(".R")]
    assert len(rows) == 4
    assert max(float(orthonormality_error(row.detach())) for row in rows) < 2e-6


def test_checkpointed_is_not_checkpointed() -> None:
    found = []
    for checkpointed in (False, True):
        model = adapted(tiny_llama(), "f2+l2").train()
        if checkpointed:
            model.enable_input_require_grads()
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        batch = {key: tensor.to(HERE) for key, tensor in collate(examples()).items()}
        found.append(computed(model, batch))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_start_from_the_data_is_the_cpus(autocast: bool) -> None:
    """Batches on the CPU are taken there; the reads are the same, no random number is missing, nothing is written."""
    started = []
    for device in (HERE, torch.device("cpu")):
        torch.manual_seed(2)
        config = ReftConfig(intervention="nodireft", r=1, positions="all", layers="all", task_type="CAUSAL_LM")
        model = get_reft_model(tiny_llama(), config).to(device)
        dice = torch.Generator("cpu").manual_seed(1)
        ids = [torch.randint(1, 98, (4, 16), generator=dice, device="cpu") for _ in range(2)]
        torch.manual_seed(3)
        expected = torch.rand(2, device=device)
        torch.manual_seed(3)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast and device == HERE):
            initialize_reft_weights(model, [{"input_ids": rows, "labels": rows} for rows in ids])
        assert torch.equal(torch.rand(2, device=device), expected)
        assert all(not bool(p.any()) for n, p in model.named_parameters() if n.endswith("reft_all.default.R"))
        started.append([p.detach().cpu() for n, p in model.named_parameters() if n.endswith("reft_all.default.W")])
    assert len(started[0]) == 4
    for here, there in zip(*started, strict=True):
        along = torch.nn.functional.cosine_similarity(here, there).abs()
        assert bool((along > (0.9 if autocast else 0.999)).all())
