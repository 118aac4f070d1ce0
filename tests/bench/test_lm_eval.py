"""lm-evaluation-harness with ReFT: contexts are prompts, in its own evaluator and from its command line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bench.places import environment, tiny_causal
from tests.tiny_chat import tiny_model, tiny_tokenizer

from reftune import ReftConfig, get_reft_model

if importlib.util.find_spec("lm_eval") is None:  # a machine without the extra `lm-eval`; `make test` installs it
    pytest.skip("the package lm_eval is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from reftune.bench.lm_eval import ReftLM, _device  # noqa: E402

PAIRS = [("Is it?", " yes"), ("Is it?", " no"), ("Is it?", " n"), ("A much longer question here", " b"), ("c", " dd")]


def adapted(positions: str) -> Any:
    model = get_reft_model(tiny_model(), ReftConfig(r=2, layers="all", positions=positions, init_weights=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def ask(lm: Any) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    return list(lm.loglikelihood(requests, disable_tqdm=True))


@torch.no_grad()
def by_hand(model: Any, context: str, continuation: str, reft: bool) -> tuple[float, bool]:
    tokenizer = tiny_tokenizer()
    prompt, rest = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    mask = torch.tensor([[1] * len(prompt) + [0] * len(rest)])
    logs = model(input_ids=torch.tensor([prompt + rest]), **({"prompt_mask": mask} if reft else {}))
    logs = logs.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    tokens = torch.tensor(rest)
    return float(logs.gather(1, tokens[:, None]).sum()), bool((logs.argmax(-1) == tokens).all())


@pytest.mark.parametrize("positions", ["l2", "f2+l2", "l1+gen", "all"])
def test_scores_equal_plain_passes_that_know_the_prompt(positions: str) -> None:
    model = adapted(positions)
    lm = ReftLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=3, device="cpu")
    for found, pair in zip(ask(lm), PAIRS, strict=True):
        expected = by_hand(model, *pair, reft=True)
        assert found[0] == pytest.approx(expected[0], abs=1e-4)
        assert found[1] == expected[1]


def test_the_harness_alone_gets_a_suffix_wrong_and_a_plain_model_right() -> None:
    model = adapted("l2")
    theirs = ask(HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=3, device="cpu"))
    ours = ask(ReftLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=3, device="cpu"))
    assert max(abs(a - b) for (a, _), (b, _) in zip(theirs, ours, strict=True)) > 1e-2
    base = tiny_model()
    for lm in (HFLM, ReftLM):
        found = ask(lm(pretrained=base, tokenizer=tiny_tokenizer(), batch_size=3, device="cpu"))
        for one, pair in zip(found, PAIRS, strict=True):
            assert one[0] == pytest.approx(by_hand(base, *pair, reft=False)[0], abs=1e-4)


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    model = adapted("l2")
    lm = ReftLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=2, device="cpu", max_length=8)
    found = lm._loglikelihood_tokens([(None, list(range(10, 30)), [40, 41, 42])], disable_tqdm=True)
    whole = torch.tensor([[*range(24, 30), 40, 41]])
    with torch.no_grad():
        mask = torch.tensor([[1] * 6 + [0] * 2])
        logs = model(input_ids=whole, prompt_mask=mask).logits[0, 5:].log_softmax(-1)
    expected = sum(float(logs[i, token]) for i, token in enumerate([40, 41, 42]))
    assert found[0][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_the_command_line_loads_an_adapter_and_scores_a_task(tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "base")
    adapter = tmp_path / "adapter"
    from reftune import load_model

    model, _ = load_model(str(base))
    get_reft_model(model, ReftConfig(r=2, positions="l2", init_weights=False)).save_pretrained(adapter)
    rows = [{"q": f"is {i}", "choices": ["yes", "no"], "label": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(json.dumps(task))
    arguments = ["--model", "reftune", "--model_args", f"pretrained={base},peft={adapter}", "--tasks", "tiny"]
    arguments += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    environ = environment() | {"HF_DATASETS_CACHE": str(tmp_path / "hf"), "HF_HOME": str(tmp_path / "hf")}
    environ["PYTHONPATH"] += f":{Path(importlib.util.find_spec('lm_eval').origin).parents[1]}"  # type: ignore
    done = subprocess.run(
        [sys.executable, "-m", "reftune.bench.lm_eval", "run", *arguments], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tiny" in done.stdout
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert 0 <= results["results"]["tiny"]["acc,none"] <= 1


def test_the_accelerator_is_taken_unless_another_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    found = {str(asked): str(_device(asked)) for asked in (None, "cuda", "cuda:1", "cpu", "mps")}
    assert found == {"None": "cuda", "cuda": "cuda", "cuda:1": "cuda:1", "cpu": "cpu", "mps": "cpu"}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert {str(_device(asked)) for asked in (None, "cuda", "cpu")} == {"cpu"}
