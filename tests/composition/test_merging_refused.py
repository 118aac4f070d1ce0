"""What cannot be merged is refused in words that say why and what would do, and nothing changes."""

import pytest
import torch
from several import assert_close, logits, several

from conftest import tiny_llama
from families import tiny
from reftune import ReftConfig, get_reft_model
from reftune.tuner.probing import Probe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "f2+l2"}, "edits some tokens only .*positions='all'"),
        ({"positions": "prompt"}, "edits some tokens only .prompt at"),
        ({"positions": "all"}, "depends on the state at 'model.layers.1.output' .*component='mlp_output'"),
        ({"positions": "all", "component": "block_input"}, "no linear layer in 'model.layers.1' .* reads its input"),
        ({"positions": "all", "intervention": "lobireft", "component": "block_input"}, "reads its input as it comes"),
        ({"positions": "all", "intervention": "postblock", "component": "mlp_output"}, "act_fn='silu'"),
        ({"positions": "all", "intervention": "direft", "act_fn": "gelu", "component": "mlp_output"}, "act_fn='gelu'"),
        ({"positions": "all", "intervention": "loreft", "act_fn": "gelu", "component": "mlp_output"}, "reads h twice"),
        ({"positions": "all", "intervention": "reft_r1", "component": "mlp_output"}, "couples the tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no start that leaves h.*")
def test_what_cannot_be_merged_says_why(settings, message):
    model = several("llama", a=settings)
    wanted = logits(model)
    with pytest.raises(ValueError, match=rf"cannot be merged into the weights: .*{message}.*unload\(\)"):
        model.merge_and_unload()
    assert torch.equal(logits(model), wanted)


def test_edits_that_are_off_are_not_merged():
    model = several("llama", a={"positions": "all", "component": "mlp_output", "bias": "none"})
    wanted = logits(model)
    with model.disable_adapter(), pytest.raises(ValueError, match="its edits are switched off"):
        model.merge_and_unload()
    assert_close(logits(model.merge_and_unload()), wanted)


def test_a_constant_without_a_place_says_what_would_do():
    model = several("mistral", a={"positions": "all", "component": "mlp_output"})
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.down_proj' has no bias.*bias=\"none\""):
        model.merge_and_unload()


def test_nan_is_refused_when_asked_for():
    for safe in (True, False):
        model = several("llama", a={"positions": "all", "component": "mlp_output", "bias": "none"})
        before = model.get_base_model().model.layers[1].mlp.down_proj.weight.clone()
        with torch.no_grad():
            model.get_base_model().model.layers[1].mlp.edit_output.reft_all["a"].W[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinite" if safe else "differs from the adapter's"):
            model.merge_and_unload(safe_merge=safe)
        assert torch.equal(model.get_base_model().model.layers[1].mlp.down_proj.weight, before)


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")])
def test_a_merge_that_fails_at_its_end_leaves_no_biases(error, monkeypatch):
    model = several("llama", a={"positions": "all", "component": "mlp_output"})
    base, wanted = model.get_base_model(), logits(model)
    state, config = {name: p.clone() for name, p in base.state_dict().items()}, base.config.to_dict()
    run = Probe.run

    def at_its_end(self):
        if base.model.layers[1].mlp.down_proj.bias is None:
            return run(self)
        if error:
            raise error
        return run(self) + 1

    monkeypatch.setattr(Probe, "run", at_its_end)
    with pytest.raises(RuntimeError if error else ValueError, match="out of memory" if error else "differs from"):
        model.merge_and_unload()
    after = base.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert base.config.to_dict() == config
    assert torch.equal(logits(model), wanted)


def test_shared_weights_are_refused():
    base = tiny("llama")
    base.model.layers[2].mlp.down_proj.weight = base.model.layers[1].mlp.down_proj.weight
    model = several(base=base, a={"positions": "all", "component": "mlp_output"})
    with pytest.raises(ValueError, match="is the same tensor as"):
        model.merge_and_unload()


def test_quantised_bases_are_refused():
    model = several("llama", a={"positions": "all", "component": "mlp_output"})
    model.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match="the base model is quantised"):
        model.merge_and_unload()


def test_quantised_layers_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = tiny_llama()
    for layer in base.model.layers:
        old = layer.mlp.down_proj
        layer.mlp.down_proj = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, bias=False)
    model = get_reft_model(
        base, ReftConfig(layers=[1], positions="all", component="model.layers[1].mlp.down_proj.output")
    )
    with pytest.raises(ValueError, match=r"quantised, sharded or offloaded \(Int8Params\)"):
        model.merge_and_unload()
