"""load_pyreft against what pyreft itself saved and computed (tests/fixtures/pyreft, made by make.py there)."""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from reftune import ReftConfig, get_reft_model
from reftune.checkpoint.pyreft import load_pyreft

FIXTURES = Path(__file__).parent.parent / "fixtures" / "pyreft"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
POSITIONS = {"pair": "f2+l2", "pairs": "f2+l2"}
ACT_FN = {"loreft_relu": "relu"}


def _make():
    spec = importlib.util.spec_from_file_location("make_pyreft_fixtures", FIXTURES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str, positions: str = "l1") -> ReftConfig:
    return load_pyreft(FIXTURES / name, positions, act_fn=ACT_FN.get(name))


def quiet(name: str, positions: str = "l1") -> ReftConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load(name, positions)


def recorded_positions(name: str) -> list[str]:
    with safe_open(FIXTURES / name / "expected.safetensors", framework="pt") as file:
        text = file.metadata()["expected_positions"]
    return text.split(",") if text else []


def copy_of(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def only_bin(folder: Path) -> Path:
    (path,) = folder.glob("*.bin")
    return path


def rewrite(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_intervention_gives_pyrefts_output(name: str) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    config = quiet(name, POSITIONS.get(name, "l1"))
    for i, edit in enumerate(config.edits()):
        intervention = edit["given"].eval()
        torch.testing.assert_close(intervention(expected["h"]), expected[f"output.{i}"], rtol=0, atol=1e-6)
    assert f"output.{len(config.edits())}" not in expected


@pytest.mark.parametrize("name", [n for n in NAMES if recorded_positions(n)])
@torch.no_grad()
def test_a_model_gives_pyrefts_logits(name: str) -> None:
    make = _make()
    expected = load_file(FIXTURES / name / "expected.safetensors")["logits"]
    base = make.base_model()
    plain = base(make.input_ids()).logits
    model = get_reft_model(base, load_pyreft(FIXTURES / name, recorded_positions(name))).eval()
    found = model(make.input_ids()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert (found - plain).abs().max() > 1e-3


@torch.no_grad()
def test_one_expression_is_dealt_to_the_interventions_of_a_site() -> None:
    make = _make()
    config = load("pairs", "f2+l2")
    assert [e["positions"] for e in config.edits()] == recorded_positions("pairs")
    model = get_reft_model(make.base_model(), config).eval()
    expected = load_file(FIXTURES / "pairs" / "expected.safetensors")["logits"]
    torch.testing.assert_close(model(make.input_ids()).logits, expected, rtol=0, atol=2e-6)


def test_a_lone_intervention_edits_at_every_term() -> None:
    assert [e["positions"] for e in load("loreft", "f2+l2").edits()] == ["f2+l2"]
    assert load("loreft", "f2+l2").groups("f2+l2") == ("f2+l2",)


def test_what_was_loaded_saves_and_loads_as_ours(tmp_path: Path) -> None:
    from peft import PeftModel

    make = _make()
    model = get_reft_model(make.base_model(), load("pair", "f2+l2")).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make.base_model(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(make.input_ids()).logits, again(make.input_ids()).logits)


def test_kinds_layers_and_paths_come_from_the_save() -> None:
    (edit,) = load("path").edits()
    assert (edit["intervention"], edit["r"], edit["component"]) == ("loreft", 3, "model.layers[2].output")
    (edit,) = load("nodireft").edits()
    assert (edit["intervention"], edit["layer"], edit["component"]) == ("nodireft", 1, "block_input")
    assert load_pyreft(FIXTURES / "loreft", "l1", task_type="CAUSAL_LM").task_type == "CAUSAL_LM"


@pytest.mark.parametrize(("name", "error"), [("loreft_drifted", "1e-5"), ("loreft", None)])
def test_rows_that_are_not_orthonormal_are_kept_by_a_free_kind(name: str, error: str | None) -> None:
    if error is None:
        assert load(name).edits()[0]["intervention"] == "loreft"
        return
    with pytest.warns(UserWarning, match="not orthonormal.*loaded as 'noreft'"):
        config = load(name)
    assert config.edits()[0]["intervention"] == "noreft"


@pytest.mark.parametrize(("name", "free"), [("consreft", "noreft"), ("lobireft", "nodireft"), ("direft", "nodireft")])
@torch.no_grad()
def test_every_kind_has_a_free_one_of_the_same_formula(name: str, free: str, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path)
    state = torch.load(only_bin(folder), weights_only=True)
    before = load(name).edits()[0]["given"]
    prefix = "rotate_layer.parametrizations.weight."
    state = {k: v for k, v in state.items() if not k.startswith(prefix)}
    torch.save(state | {"rotate_layer": 1.5 * before.R.mT}, only_bin(folder))
    with pytest.warns(UserWarning, match="not orthonormal"):
        after = load_pyreft(folder, "l1").edits()[0]["given"]
    assert after.kind == free
    h, R = torch.randn(5, 32), 1.5 * before.R
    source = {"consreft": lambda: before.b - h @ R.mT, "lobireft": lambda: before.b.expand(5, 3)}
    learned = source.get(name, lambda: h @ before.W.mT + before.b)()
    torch.testing.assert_close(after(h), h + learned @ R, rtol=0, atol=2e-6)


def test_a_square_rotation_is_the_exponential_that_torch_computes(tmp_path: Path) -> None:
    class Rotation(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(6, 6)))

    layer = torch.nn.utils.parametrizations.orthogonal(Rotation())
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.1 * torch.randn(6, 6))
    folder = copy_of("consreft", tmp_path)
    state = {f"rotate_layer.{key}": value for key, value in layer.state_dict().items()}
    torch.save(state | {"learned_source": torch.rand(6)}, only_bin(folder))
    config = json.loads((folder / "config.json").read_text())
    config["representations"][0][4] = 6
    rewrite(folder, representations=config["representations"])
    loaded = load_pyreft(folder, "l1").edits()[0]["given"]
    assert loaded.kind == "consreft"
    torch.testing.assert_close(loaded.R, layer.weight.mT, rtol=0, atol=1e-6)


def test_the_older_file_names_are_found(tmp_path: Path) -> None:
    folder = copy_of("loreft", tmp_path)
    only_bin(folder).rename(folder / "intkey_layer.1.comp.block_output.unit.pos.nunit.1#0.bin")
    assert load_pyreft(folder, "l1").edits()[0]["layer"] == 1


def test_trained_model_weights_beside_it_are_announced(tmp_path: Path) -> None:
    folder = copy_of("loreft", tmp_path)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="trained weights of the model itself"):
        load_pyreft(folder, "l1")


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pyreft.interventions.NewIntervention", "__main__.LoreftIntervention", "int"])
def test_an_unknown_intervention_class_is_an_error(name: str, tmp_path: Path) -> None:
    folder = copy_of("loreft", tmp_path)
    rewrite(folder, intervention_types=[f"<class '{name}'>"])
    with pytest.raises(ValueError, match=r"which reftune does not know\. Known are pyreft's LoreftIntervention"):
        load_pyreft(folder, "l1")


def test_a_missing_bin_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = copy_of("pair", tmp_path)
    (folder / "intkey_layer_2_comp_block_output_unit_pos_nunit_1#1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"nunit_1#1\.bin.*It has: intkey_layer_2"):
        load_pyreft(folder, "f1+l1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 31)}, r"W should have the shape \(3, 32\)"),
        ({"bias": torch.zeros(4)}, r"b should have the shape \(3,\)"),
        ({"rotate_layer": torch.eye(32)[:, :2]}, r"has rank 2, but config.json says low_rank_dimension=3"),
        ({"rotate_layer": torch.zeros(3)}, r"rotate_layer should be a matrix"),
        ({"rotate_layer": None}, r"has no tensor .*rotate_layer"),
    ],
)
def test_wrong_tensors_are_an_error(change: dict, message: str, tmp_path: Path) -> None:
    folder = copy_of("loreft", tmp_path)
    state = dict(torch.load(only_bin(folder), weights_only=True)) | change
    torch.save({k: v for k, v in state.items() if v is not None}, only_bin(folder))
    with pytest.raises(ValueError, match=message):
        load_pyreft(folder, "l1")


class Payload:
    """What a pickle of code would be."""


@pytest.mark.parametrize("content", [Payload(), [1, 2], b"not a pickle"])
def test_what_is_no_dict_of_tensors_is_refused_unread(content: object, tmp_path: Path) -> None:
    folder = copy_of("loreft", tmp_path)
    if isinstance(content, bytes):
        only_bin(folder).write_bytes(content)
    else:
        torch.save(content, only_bin(folder))
    with pytest.raises(ValueError, match="dict of tensors"):
        load_pyreft(folder, "l1")


def test_a_directory_that_pyreft_did_not_save_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        load_pyreft(tmp_path / "nowhere", "l1")
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        load_pyreft(tmp_path, "l1")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"not the config of a pyreft save \(KeyError: 'representations'\)"):
        load_pyreft(tmp_path, "l1")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not the config of a pyreft save"):
        load_pyreft(tmp_path, "l1")


def test_the_right_call_is_named_for_what_looks_like_it(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "loreft", tmp_path / "intervenable_model")
    with pytest.raises(FileNotFoundError, match=r"Give .*intervenable_model"):
        load_pyreft(tmp_path, "l1")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"PeftModel\.from_pretrained"):
        load_pyreft(tmp_path, "l1")


@pytest.mark.parametrize(("field", "value"), [(1, "query_output"), (1, "../x"), (1, "a/b.output"), (2, "h.pos")])
def test_a_place_we_cannot_edit_is_an_error(field: int, value: str, tmp_path: Path) -> None:
    folder = copy_of("loreft", tmp_path)
    entry = json.loads((folder / "config.json").read_text())["representations"][0]
    entry[field] = value
    rewrite(folder, representations=[entry])
    with pytest.raises(ValueError, match=r"edits the (component|unit) "):
        load_pyreft(folder, "l1")


def test_positions_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 interventions at one site.*has 1 term"):
        load("pair", "l1")
    with pytest.raises(ValueError, match="names 1 expressions, but pyreft saved 2"):
        load_pyreft(FIXTURES / "pair", ["l1"])
    with pytest.raises(ValueError, match="is no position"):
        load_pyreft(FIXTURES / "pair", ["l1", "x9"])


def test_a_second_bias_that_cannot_be_folded_is_an_error() -> None:
    with pytest.raises(ValueError, match="add_bias=True"):
        load_pyreft(FIXTURES / "noreft_bias", "l1", act_fn="relu")
