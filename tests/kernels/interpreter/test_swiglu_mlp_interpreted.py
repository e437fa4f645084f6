"""swiglu_mlp's launchers, forward and backward, against the reference; swiglu's tests cover every configuration."""

import pytest
import torch

from ddt_kernels import swiglu_launch
from ddt_kernels.swiglu_launch import launch_backward_activation, launch_mlp_backward, launch_mlp_forward
from kernel_testing import poison_empty
from swiglu_cases import LAYOUTS, check_against_reference, make_grad, make_mlp_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(inputs):
    grad = make_grad(inputs)
    z, gate_up = launch_mlp_forward(*inputs.values(), True, False)
    inference, nothing = launch_mlp_forward(*inputs.values(), False, False)
    assert torch.equal(z, inference)
    assert nothing.numel() == 0
    grad_x, grad_weights, grad_w2 = launch_mlp_backward(grad, *inputs.values(), gate_up)
    grad_w1, grad_w3 = grad_weights.chunk(2)
    check_against_reference(inputs, grad, z, {"x": grad_x, "w1": grad_w1, "w3": grad_w3, "w2": grad_w2})


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("shape", "out", "dtype"),
    [
        ((2, 20, 72, 170), 72, BF16),
        ((1, 37, 64, 72), 24, BF16),
        ((1, 24, 85, 37), 85, BF16),
        ((2, 9, 72, 48), 72, FP16),
        ((2, 20, 72, 170), 72, FP32),
    ],
)
def test_matches_reference(arch, shape, out, dtype, monkeypatch):
    monkeypatch.setattr(swiglu_launch, "target_arch", lambda device: arch)
    poison_empty(monkeypatch)
    check(make_mlp_inputs(shape, dtype, out=out))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout):
    check(make_mlp_inputs((2, 12, 40, 48), BF16, layout=layout))


def test_y_in_the_place_of_its_gradient_changes_nothing_else():
    generator = torch.Generator().manual_seed(0)
    gate_up, grad_y = (torch.randn(33, columns, generator=generator) for columns in (1400, 700))
    alone = launch_backward_activation(grad_y, gate_up)
    y = torch.full_like(grad_y, float("nan"))
    beside = launch_backward_activation(grad_y, gate_up, y)
    over = launch_backward_activation(grad_y, gate_up, grad_y)
    assert torch.equal(alone, beside)
    assert torch.equal(alone, over)
    assert torch.equal(y, grad_y)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up)
