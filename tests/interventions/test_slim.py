"""Slim modules are modules; packed weights are the same weights."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch

from reftune import LoreftIntervention
from reftune.interventions.slim import pack

H = torch.randn(3, 16)


def size(module) -> int:
    return sum("hooks" in name for name in module.__dict__)


def test_a_slim_module_edits_hooks_copies_and_loads_as_before() -> None:
    module = LoreftIntervention(16, 2, init_weights=False)
    expected = module(H)
    module.slim()
    assert size(module) == 0
    assert torch.equal(module(H), expected)
    module.slim()
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    module(H)
    module.slim()  # a table in use stays
    module(H)
    assert len(seen) == 2
    handle.remove()
    module.slim()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(H), expected)
    other = LoreftIntervention(16, 2)
    other.slim()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(H), expected)


def test_reading_and_loading_make_no_tables() -> None:
    module = LoreftIntervention(16, 2)
    module.slim()
    module(H)
    module.load_state_dict(module.state_dict())
    module.eval()
    assert size(module) == 0
    seen = []
    handles = [module.register_forward_pre_hook(lambda *_: seen.append(1)) for _ in range(2)]
    handles[0].remove()
    module(H)
    assert len(seen) == 1


def test_clearing_hooks_that_are_not_there_is_allowed_and_writing_past_register_is_refused() -> None:
    module = LoreftIntervention(16, 2)
    module.slim()
    module._forward_hooks.clear()
    assert module._forward_hooks.pop(3, None) is None
    with pytest.raises(TypeError, match="register_forward_hook"):
        module._forward_hooks[3] = print  # would be lost, or be every slim module's
    assert isinstance(module._forward_pre_hooks, OrderedDict)
    assert size(module) == 0


def test_packing_keeps_the_numbers_in_one_block_and_can_be_trained_on() -> None:
    modules = [LoreftIntervention(16, 2, init_weights=False), LoreftIntervention(16, 3, dtype=torch.float64)]
    expected = [module(H.to(module.R.dtype)) for module in modules]
    state = [copy.deepcopy(module.state_dict()) for module in modules]
    pack(modules)
    assert modules[0].R.untyped_storage().data_ptr() == modules[0].W.untyped_storage().data_ptr()
    assert modules[0].R.dtype == torch.float32
    assert modules[1].R.dtype == torch.float64
    for module, before, output in zip(modules, state, expected, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
        assert torch.equal(module(H.to(module.R.dtype)), output)
        module.requires_grad_(True)
        module(H.to(module.R.dtype)).square().sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        assert not torch.equal(module.W, before["W"])


def test_packed_weights_count_their_changes_apart() -> None:
    """Autograd and what interventions remember of R go by these counts: another site's change is none of theirs."""
    modules = [LoreftIntervention(16, 2, init_weights=False) for _ in range(2)]
    pack(modules)
    modules[1].eval()
    modules[1](H)
    before = modules[1].R._version
    with torch.no_grad():
        modules[0].R.mul_(2)
    assert modules[1].R._version == before
    assert modules[0].R.untyped_storage().data_ptr() == modules[1].R.untyped_storage().data_ptr()
