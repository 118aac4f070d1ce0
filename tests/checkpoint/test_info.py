"""What describe reads from an adapter's two files, and how `info` prints it."""

import io
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from conftest import tiny_llama
from reftune import Intervention, ReftConfig, get_reft_model, register_intervention
from reftune.checkpoint.info import describe
from reftune.cli.info import info
from reftune.interventions import INTERVENTIONS
from reftune.operations import cost
from reftune.tuner.atomic import CONFIG, WEIGHTS, commit_config


def save(directory: Path, **config) -> Path:
    model = get_reft_model(tiny_llama(), ReftConfig(**{"init_weights": False} | config))
    model.save_pretrained(directory)
    return directory


def printed(directory: Path) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    info(str(directory), console)
    return console.file.getvalue()


def test_every_intervention_is_found_with_its_site_positions_and_size(tmp_path: Path) -> None:
    found = describe(save(tmp_path, r=3, layers=[0, -1], positions="f2+l2", task_type="CAUSAL_LM"))
    assert found.site_names == ("model.layers.0.output", "model.layers.3.output")
    assert [site.positions for site in found.sites] == ["f2", "l2"] * 2
    assert {(site.kind, site.rank, site.parameters, site.dtype) for site in found.sites} == {
        ("loreft", 3, 2 * 3 * 32 + 3, "float32")
    }
    assert (found.kind, found.positions, found.layers, found.rank) == ("loreft", "f2+l2", "0, 3", "3")
    assert (found.parameters, found.other_parameters, found.dtype) == (4 * (2 * 3 * 32 + 3), 0, "float32")
    assert found.nbytes == (tmp_path / WEIGHTS).stat().st_size
    assert found.task_type == "CAUSAL_LM"
    assert found.base_model_shape == {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4}


def test_layers_are_in_their_natural_order(tmp_path: Path) -> None:
    model = get_reft_model(tiny_llama(layers=12), ReftConfig(layers="all", positions="l1"))
    model.save_pretrained(tmp_path)
    assert [site.name for site in describe(tmp_path).sites] == [f"model.layers.{i}.output" for i in range(12)]
    assert describe(tmp_path).layers == "0-11"


NAMES = {
    "block_input": "model.layers.1.input",
    "mlp_output": "model.layers.1.mlp.output",
    "mlp_input": "model.layers.1.mlp.input",
    "attention_input": "model.layers.1.self_attn.input",
}


@pytest.mark.parametrize("positions", ["f2+l2", "gen/64", "gen:3+all"])
@pytest.mark.parametrize("component", [*NAMES, "model.layers[1].self_attn.o_proj.input"])
def test_every_position_and_component_is_read_back(tmp_path: Path, component: str, positions: str) -> None:
    found = describe(save(tmp_path, component=component, positions=positions, layers=1, share_weights=True))
    (site,) = found.sites
    assert site.positions == positions
    assert site.name == NAMES.get(component, "model.layers.1.self_attn.o_proj.input")


def test_orthonormality_is_measured_on_the_saved_rows(tmp_path: Path) -> None:
    found = describe(save(tmp_path, layers=[1, 2], positions="l1"))
    assert found.orthonormality_error is not None
    assert found.orthonormality_error < 1e-5
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.layers.2.edit_output.reft_l1.R"
    tensors[key][0] *= 1.5
    save_file(tensors, tmp_path / WEIGHTS)
    found = describe(tmp_path)
    assert found.orthonormality_error == pytest.approx(1.25, abs=1e-4)
    assert found.sites[0].orthonormality_error < 1e-5
    assert found.sites[1].orthonormality_error == found.orthonormality_error


@pytest.mark.parametrize(("kind", "rank"), [("noreft", 4), ("nodireft", 4), ("red", None), ("postblock", 4)])
def test_kinds_without_orthonormal_rows_have_no_such_error(tmp_path: Path, kind: str, rank: int | None) -> None:
    found = describe(save(tmp_path, intervention=kind))
    assert found.orthonormality_error is None
    assert {site.rank for site in found.sites} == {rank}
    assert "no orthonormal rows" in printed(tmp_path)


@pytest.mark.parametrize("kind", ["consreft", "lobireft", "direft", "reft_r1"])
def test_kinds_with_orthonormal_rows_have_one(tmp_path: Path, kind: str) -> None:
    found = describe(save(tmp_path, intervention=kind))
    assert found.orthonormality_error is not None
    assert {site.rank for site in found.sites} == {1 if kind == "reft_r1" else 4}


def test_representations_of_several_kinds_are_told_apart(tmp_path: Path) -> None:
    entries = [
        {"layer": 1, "intervention": "red", "positions": "f1"},
        {"layer": 1, "intervention": "loreft", "positions": "l1"},
        {"layer": -1, "intervention": "nodireft", "positions": "l1", "component": "mlp_output"},
        {"layer": -1, "intervention": "direft", "positions": "l1", "component": "attention_output"},
        {"layer": -1, "intervention": "red", "positions": "l1", "component": "attention_input"},
        {"layer": -1, "intervention": "noreft", "positions": "l1", "component": "block_input"},
        {"component": "model.layers[2].output", "intervention": "lobireft", "positions": "l1"},
    ]
    found = describe(save(tmp_path, representations=entries))
    assert {(site.name, site.positions): site.kind for site in found.sites} == {
        ("model.layers.1.output", "f1"): "red",
        ("model.layers.1.output", "l1"): "loreft",
        ("model.layers.2.output", "l1"): "lobireft",
        ("model.layers.3.mlp.output", "l1"): "nodireft",
        ("model.layers.3.self_attn.input", "l1"): "red",
        ("model.layers.3.self_attn.output", "l1"): "direft",
        ("model.layers.3.input", "l1"): "noreft",
    }
    assert set(found.positions.split(", ")) == {"f1", "l1"}


def test_a_module_inside_a_named_part_has_its_own_kind(tmp_path: Path) -> None:
    entries = [
        {"layer": 1, "intervention": "nodireft", "component": "mlp.down_proj.output", "positions": "l1"},
        {"layer": 2, "intervention": "noreft", "component": "mlp.down_proj.output", "positions": "l1"},
        {"layer": 1, "intervention": "red", "component": "mlp_output", "positions": "l1"},
    ]
    found = describe(save(tmp_path, representations=entries))
    assert {site.name: site.kind for site in found.sites} == {
        "model.layers.1.mlp.down_proj.output": "nodireft",
        "model.layers.2.mlp.down_proj.output": "noreft",
        "model.layers.1.mlp.output": "red",
    }


def test_a_lora_part_is_counted_apart(tmp_path: Path) -> None:
    found = describe(save(tmp_path, positions="l1", lora=LoraConfig(r=2, target_modules=["o_proj"])))
    assert (found.lora_parameters, found.other_parameters) == (4 * 2 * 2 * 32, 0)
    assert "LoRA part" in printed(tmp_path)
    assert "saved whole" not in printed(tmp_path)


def test_the_directions_of_others_are_no_parameters(tmp_path: Path) -> None:
    model = get_reft_model(tiny_llama(), ReftConfig(r=2, task_type="CAUSAL_LM"), "a")
    model.add_adapter("b", ReftConfig(r=2, orthogonal_to="a", task_type="CAUSAL_LM"))
    model.set_adapter("b")
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert describe(tmp_path / "b").parameters == cost(model).parameters == model.trainable_parameters().count
    assert "| Size | 260 parameters" in (tmp_path / "b" / "README.md").read_text()


def test_a_trained_head_is_counted_apart(tmp_path: Path) -> None:
    model = LlamaForSequenceClassification(tiny_llama().config)
    get_reft_model(model, ReftConfig(r=2, positions="l1", task_type="SEQ_CLS")).save_pretrained(tmp_path)
    found = describe(tmp_path)
    assert (found.parameters, found.other_parameters) == (2 * 2 * 32 + 2, 2 * 32)
    assert "64 parameters" in printed(tmp_path)


def test_bf16_weights_are_read(tmp_path: Path) -> None:
    save(tmp_path, positions="l1")
    save_file({k: v.bfloat16() for k, v in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    found = describe(tmp_path)
    assert found.dtype == "bfloat16"
    assert 1e-5 < found.orthonormality_error < 1e-2


def test_the_config_that_the_weights_were_saved_with_counts(tmp_path: Path) -> None:
    save(tmp_path, positions="l1")
    commit_config(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"positions": "f9"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert describe(tmp_path).positions == "l1"


def test_a_kind_that_is_not_imported_is_described_all_the_same(tmp_path: Path) -> None:
    @register_intervention("info_shift")
    class InfoShift(Intervention):
        """h + b."""

        has_rank = False

        def reset_parameters(self) -> None:
            self.b = torch.nn.Parameter(torch.zeros(self.embed_dim))

        def delta(self, h: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
            return self.b.expand_as(h)

    try:
        save(tmp_path, intervention="info_shift", positions="l1")
    finally:
        del INTERVENTIONS["info_shift"]
    found = describe(tmp_path)
    assert (found.kind, found.parameters, found.orthonormality_error) == ("info_shift", 32, None)
    assert "import the module that registers this kind" in printed(tmp_path)


def test_the_table_prints_everything(tmp_path: Path) -> None:
    save(tmp_path, r=4, layers=[1, 2], positions="f2+l1", task_type="CAUSAL_LM")
    text = printed(tmp_path)
    for part in (
        "LoReFT: h + Rᵀ(Wh + b − Rh), R Rᵀ = I",
        "f2+l1: the first 2 tokens and the last token of the prompt",
        "1-2 of 4",
        "1,040 parameters in float32",
        "kB on disk",
        "max |RRᵀ − I| = ",
        "model.layers.2.output",
        "hidden_size 32",
    ):
        assert part in text


def test_what_is_no_adapter_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        describe(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"it has no {CONFIG}"):
        describe(tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(FileNotFoundError, match=f"it has no {WEIGHTS}"):
        describe(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        describe(tmp_path)
    save_file({"base_model.model.lora_A": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="not a ReFT adapter: its peft_type is 'LORA'"):
        describe(tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "REFT", "positions": "l1", "intervention": "loreft"}')
    with pytest.raises(ValueError, match="holds no intervention"):
        describe(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        describe(tmp_path)
