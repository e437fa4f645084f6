"""swiglu's kernels, forward and backward, against the reference, every configuration on small shapes."""

import pytest
import torch
from torch.nn.functional import linear

from ddt_kernels import swiglu_launch
from ddt_kernels.swiglu_launch import launch_backward, launch_forward
from kernel_testing import assert_as_accurate
from swiglu_cases import LAYOUTS, check_against_reference, make_grad, make_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(inputs, tf32=False):
    F = inputs["w1"].shape[0]
    grad = make_grad(inputs)
    y, gate_up = launch_forward(*inputs.values(), True, tf32)
    inference, nothing = launch_forward(*inputs.values(), False, tf32)
    assert torch.equal(y, inference)
    assert nothing.numel() == 0
    for half, name in zip(gate_up.split(F, -1), ("w1", "w3"), strict=True):
        x, weight = inputs["x"], inputs[name]
        assert_as_accurate(f"x · {name}ᵀ", half, linear(x, weight), linear(x.double(), weight.double()))
    grad_x, grad_weights = launch_backward(grad, *inputs.values(), gate_up)
    grad_w1, grad_w3 = grad_weights.chunk(2)
    check_against_reference(inputs, grad, y, {"x": grad_x, "w1": grad_w1, "w3": grad_w3})


@pytest.fixture(params=[80, 90, 100])
def arch(request, monkeypatch):
    """Which architecture's code is interpreted: descriptors from 90 on, pointers before."""
    monkeypatch.setattr(swiglu_launch, "target_arch", lambda device: request.param)
    return request.param


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 20, 72, 170), BF16),  # rows of y: not a multiple of 16 bytes
        ((1, 37, 64, 72), BF16),
        ((1, 24, 85, 37), BF16),  # rows of everything: an odd number of elements
        ((3, 1, 341, 24), FP16),
        ((2, 9, 72, 48), FP16),
        ((2, 20, 72, 170), FP32),
        ((1, 45, 72, 1), FP32),  # enough elements that plain PyTorch's largest error is not luck
    ],
)
def test_matches_reference(arch, shape, dtype):
    check(make_inputs(shape, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(arch, layout):
    check(make_inputs((2, 12, 40, 48), BF16, layout=layout))


def test_a_base_address_no_descriptor_takes():
    wide = make_inputs((2, 12, 41, 48), BF16, layout="rows")
    inputs = {name: tensor[..., 1:] for name, tensor in wide.items()}
    assert not swiglu_launch.descriptor_fits(inputs["x"])
    check(inputs)


def test_rows_that_are_all_one():
    inputs = make_inputs((1, 1, 40, 48), BF16)
    inputs["x"] = inputs["x"].expand(2, 12, 40)
    assert not swiglu_launch.descriptor_fits(inputs["x"].reshape(-1, 40))
    check(inputs)


CONFIGS = [
    (arch, config, dtype, tf32)
    for arch, dtype, tf32, configs in (
        (90, BF16, False, swiglu_launch.HALF_BY_DESCRIPTOR),
        (80, BF16, False, swiglu_launch.HALF_BY_POINTER),
        (90, FP32, True, swiglu_launch.TF32_BY_DESCRIPTOR),
        (80, FP32, True, swiglu_launch.TF32_BY_POINTER),
        (90, FP32, False, swiglu_launch.IEEE),
    )
    for config in configs
]


@pytest.mark.parametrize(("arch", "config", "dtype", "tf32"), CONFIGS)
def test_every_configuration_with_several_tiles_per_program(arch, config, dtype, tf32, monkeypatch):
    monkeypatch.setattr(swiglu_launch, "target_arch", lambda device: arch)
    monkeypatch.setattr(swiglu_launch, "forward_config", lambda *args: config)
    monkeypatch.setattr(swiglu_launch, "resident_programs", lambda *args: 2)
    check(make_inputs((1, config.block_m + 9, 72, 2 * config.block_f + 8), dtype), tf32)


def test_more_tile_rows_than_a_group_and_a_last_one_that_is_smaller(monkeypatch):
    monkeypatch.setattr(swiglu_launch, "forward_config", lambda *args: swiglu_launch.HALF_BY_DESCRIPTOR[-1])
    check(make_inputs((1, 64 * (swiglu_launch.GROUP + 2) - 5, 16, 40), FP16))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_saturated_gates():
    inputs = make_inputs((1, 16, 16, 16), FP32)
    inputs["x"] = inputs["x"] * 400  # exp(-gate) overflows
    check(inputs)
