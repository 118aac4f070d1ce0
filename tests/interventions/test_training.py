"""Rows that stay orthonormal whatever training does to them: optimisers, save and load, casts, bf16 parameters."""

import pytest
import torch
from hard_training import KINDS, OPTIMIZERS, build, edit_space, train

from reftune.interventions import INTERVENTIONS, orthonormal_rows, orthonormality_error

# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_stay_orthonormal_at_a_huge_learning_rate(kind: str, optimizer: str) -> None:
    module = build(kind)
    train(module, OPTIMIZERS[optimizer](list(module.parameters())), 25)
    assert torch.isfinite(module.R).all()
    with torch.no_grad():
        module.eval()(torch.randn(3, 24))
    assert orthonormality_error(module.R) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_after_save_and_load(kind: str) -> None:
    """pyreft's R is 0.28 away from orthonormal rows after this."""
    first = build(kind)
    train(first, OPTIMIZERS["adamw"](list(first.parameters())), 10)
    with torch.no_grad():
        first.eval()(torch.randn(3, 24))
    second = build(kind)
    second.load_state_dict(first.state_dict())
    h = torch.randn(3, 24)
    assert torch.equal(second.eval()(h), first(h))
    train(second, OPTIMIZERS["adamw"](list(second.parameters())), 50)
    assert orthonormality_error(edit_space(second)) < 1e-5


def test_training_on_after_save_and_load_is_training_on() -> None:
    first = build("loreft")
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    train(first, optimizer, 5)
    second = build("loreft")
    second.load_state_dict(first.state_dict())
    for module in (first, second):
        torch.manual_seed(1)
        train(module, torch.optim.SGD(module.parameters(), lr=0.1), 5)
    assert torch.equal(first.R, second.R)
    assert torch.equal(first.W, second.W)


@pytest.mark.parametrize("kind", KINDS)
def test_an_eval_right_after_an_optimiser_step_sees_orthonormal_rows(kind: str) -> None:
    module = build(kind)
    optimizer = OPTIMIZERS["adamw"](list(module.parameters()))
    h = torch.randn(3, 24)
    for _ in range(3):
        with torch.no_grad():
            module.eval()(h)  # rows are remembered here, and must be forgotten by the step
        train(module, optimizer, 1)
        assert orthonormality_error(module.R) > 1e-3
        with torch.no_grad():
            module.eval()(h)
        assert orthonormality_error(edit_space(module)) < 1e-5


def test_weight_decay_alone_does_not_touch_the_edit() -> None:
    """Measured: one AdamW step with weight decay sets pyreft's R to zero."""
    module = build("lobireft", bias="frozen")
    h = torch.randn(3, 24)
    with torch.no_grad():
        before = module.eval()(h)
        for _ in range(50):
            module.R.mul_(0.9)
        torch.testing.assert_close(module(h), before)
        module.R.mul_(1e-30)
        torch.testing.assert_close(module(h), before)


def test_steps_through_data_are_seen_at_the_next_forward() -> None:
    """Old optimisers write p.data, which leaves no trace in the version counter."""
    module = build("loreft")
    h = torch.randn(3, 24)
    with torch.no_grad():
        module.eval()(h)
    module.train()(h).sum().backward()
    module.R.data.add_(module.R.grad)
    assert orthonormality_error(edit_space(module)) < 1e-5  # in training
    with torch.no_grad():
        module.eval()(h)
    module.R.data.mul_(3.0)
    module.train()
    with torch.no_grad():
        module.eval()(h)
    assert orthonormality_error(edit_space(module)) < 1e-5


def test_a_training_forward_in_eval_mode_forgets_the_rows_too() -> None:
    module = build("loreft").eval()
    h = torch.randn(3, 24)
    with torch.no_grad():
        module(h)
    module(h).sum().backward()
    module.R.data.add_(module.R.grad)  # leaves no trace
    with torch.no_grad():
        module(h)
    assert orthonormality_error(edit_space(module)) < 1e-5


def test_rows_found_in_inference_mode_do_not_reach_autograd() -> None:
    module = build("loreft").bfloat16()
    module.R.requires_grad_(False)
    with torch.inference_mode():
        module(torch.randn(3, 24))
    module(torch.randn(3, 24)).sum().backward()
    assert module.W.grad.abs().max() > 0


def test_a_cast_there_and_back_is_noticed() -> None:
    """The memory of R may be handed out again at the same address with the same version."""
    module = build("loreft").eval()
    h = torch.randn(3, 24)
    with torch.no_grad():
        for _ in range(5):
            module(h)
            module.bfloat16().float()
            module(h)
            assert orthonormality_error(module.R) < 1e-5
            module.R.data = module.R.data.to(torch.bfloat16)
            module.R.data = module.R.data.to(torch.float32)
            module(h)
            assert orthonormality_error(module.R) < 1e-5


def test_a_frozen_r_is_put_right_and_the_rest_trains() -> None:
    module = build("loreft")
    module.R.requires_grad_(False)
    with torch.inference_mode():
        module.eval()(torch.randn(3, 24))
    module.train()(torch.randn(3, 24)).sum().backward()
    assert module.R.grad is None
    assert module.W.grad is not None


def test_functional_call_differentiates_through_qr_and_writes_nothing() -> None:
    module = build("loreft")
    raw = torch.randn(4, 24, requires_grad=True)
    kept = raw.detach().clone()
    h = torch.randn(3, 24)
    out = torch.func.functional_call(module, {"R": raw}, (h,))
    assert torch.equal(raw, kept)
    rows = orthonormal_rows(raw.detach())
    expected = h + (h @ module.W.T + module.b - h @ rows.T) @ rows
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert raw.grad.abs().max() > 0


# -- bf16 parameters (TRL casts a QLoRA adapter by p.data = p.data.to(bfloat16)) --------------------------------------


@pytest.mark.parametrize("kind", sorted(k for k, c in INTERVENTIONS.items() if c.__module__.startswith("reftune.")))
def test_parameters_cast_to_bf16_edit_train_and_save(kind: str) -> None:
    module = build(kind)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    h = torch.randn(4, 24)
    with torch.no_grad():
        edited = module.eval()(h)
    assert edited.dtype == torch.float32
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    train(module, torch.optim.SGD(module.parameters(), lr=1.0), 5, torch.bfloat16)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, before[name]), name
    if module.orthonormal:
        assert orthonormality_error(edit_space(module)) < 1e-5
        with torch.no_grad():
            module.eval()(h)
            assert orthonormality_error(edit_space(module)) < 1e-5


@pytest.mark.parametrize("kind", ["loreft", "direft", "consreft", "lobireft"])
def test_with_bf16_parameters_what_is_orthogonal_to_r_is_untouched(kind: str) -> None:
    module = build(kind).bfloat16().eval()
    h = torch.randn(6, 24)
    with torch.no_grad():
        rows = module.rows()
        away = torch.eye(24) - rows.T @ rows
        torch.testing.assert_close((module(h) - h) @ away, torch.zeros(6, 24), atol=1e-5, rtol=0)


def test_an_r_that_becomes_an_inference_tensor_after_it_was_used() -> None:
    module = build("loreft").eval()
    h = torch.randn(3, 24)
    with torch.no_grad():
        expected = module(h)
    with torch.inference_mode():
        module._parameters["R"] = torch.nn.Parameter(module.R.clone(), requires_grad=False)
        torch.testing.assert_close(module(h), expected)
