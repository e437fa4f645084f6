"""The kernels of swiglu and swiglu_mlp, fused and plain, every configuration on small shapes, forward and backward,
against the reference."""

import pytest
import torch
from torch.nn.functional import linear

from ddt_kernels import reference, swiglu_launch
from ddt_kernels.swiglu_launch import (
    launch_backward,
    launch_backward_activation,
    launch_forward,
    launch_mlp_backward,
    launch_mlp_forward,
)
from kernel_testing import BF16, FP16, FP32, assert_as_accurate, check_against_reference
from swiglu_cases import LAYOUTS, check_silu, make_biased_inputs, make_grad, make_inputs, make_mlp_inputs


def check(inputs, tf32=False):
    """Of swiglu_mlp where there is a w2."""
    mlp, biased = "w2" in inputs, "b1" in inputs
    names = ["x", "w1", "w3", "w2"] if mlp else ["x", "w1", "w3"]
    weights, biases = [inputs[name] for name in names], list(inputs.values())[len(names) :]
    forward, backward = (launch_mlp_forward, launch_mlp_backward) if mlp else (launch_forward, launch_backward)
    grad = make_grad(inputs)
    output, gate_up = forward(*weights, True, tf32, *biases)
    inference, nothing = forward(*weights, False, tf32, *biases)
    assert torch.equal(output, inference)
    assert nothing.numel() == 0
    for half, name in zip(gate_up.chunk(2, -1), "13", strict=True):
        arguments = [inputs[key] for key in ("x", f"w{name}", f"b{name}") if key in inputs]
        wide = linear(*(tensor.double() for tensor in arguments))
        assert_as_accurate(f"x · w{name}ᵀ", half, linear(*arguments), wide)
    grad_x, grad_weights, *grad_w2, grad_biases = backward(grad, *weights, gate_up, biased)
    sizes = [bias.shape[0] for bias in biases]
    made = (grad_x, *grad_weights.chunk(2), *grad_w2, *(grad_biases.split(sizes) if biased else ()))
    gradients = dict(zip(inputs, made, strict=True))
    check_against_reference(reference.swiglu_mlp if mlp else reference.swiglu, inputs, [output], [grad], gradients)


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
        ((1, 45, 72, 1), BF16),
    ],
)
def test_matches_reference(arch, shape, dtype):
    check(make_inputs(shape, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(arch, layout):
    check(make_inputs((2, 12, 40, 48), BF16, layout=layout))


def test_what_no_descriptor_takes():
    wide, one = make_inputs((2, 12, 41, 48), BF16, layout="rows"), make_inputs((1, 1, 40, 48), BF16)
    odd_base_address = {name: tensor[..., 1:] for name, tensor in wide.items()}
    rows_all_one = one | {"x": one["x"].expand(2, 12, 40)}
    for inputs in (odd_base_address, rows_all_one):
        assert not swiglu_launch.descriptor_fits(inputs["x"].reshape(-1, 40))
        check(inputs)


FORWARD_CONFIGS = [
    (arch, config, width, dtype)
    for arch, width, dtype, configs in (
        (90, 8, BF16, swiglu_launch.HALF_BY_DESCRIPTOR),
        (90, 6, BF16, swiglu_launch.HALF_ODD_WIDTH),
        (80, 8, BF16, swiglu_launch.HALF_BY_POINTER),
        (90, 8, FP32, swiglu_launch.TF32_BY_DESCRIPTOR),
        (80, 8, FP32, swiglu_launch.TF32_BY_POINTER),
    )
    for config in configs
]


@pytest.mark.parametrize(("arch", "config", "width", "dtype"), FORWARD_CONFIGS)
def test_every_configuration_with_several_tiles_per_program(arch, config, width, dtype, monkeypatch):
    monkeypatch.setattr(swiglu_launch, "target_arch", lambda device: arch)
    monkeypatch.setattr(swiglu_launch, "forward_config", lambda *args: config)
    monkeypatch.setattr(swiglu_launch, "resident_programs", lambda *args: 2)
    check(make_inputs((1, config.block_m + 9, 72, 2 * config.block_f + width), dtype), tf32=dtype == FP32)


BACKWARD_CONFIGS = [
    (arch, config)
    for arch, configs in ((90, swiglu_launch.BACKWARD_BY_DESCRIPTOR), (80, swiglu_launch.BACKWARD_BY_POINTER))
    for config in configs
]


@pytest.mark.parametrize(("arch", "config"), BACKWARD_CONFIGS)
def test_every_backward_configuration_with_several_tiles_per_program(arch, config, monkeypatch):
    monkeypatch.setattr(swiglu_launch, "target_arch", lambda device: arch)
    monkeypatch.setattr(swiglu_launch, "choose", lambda op, key, candidates, default, run, device: default)
    monkeypatch.setattr(swiglu_launch, "BACKWARD_BY_DESCRIPTOR", (config,))
    monkeypatch.setattr(swiglu_launch, "BACKWARD_BY_POINTER", (config,))
    monkeypatch.setattr(swiglu_launch, "resident_programs", lambda *args: 2)
    check(make_mlp_inputs((1, config.block_m + 9, 40, 2 * config.block_f + 8), BF16, out=72))


def test_more_tile_rows_than_a_group_and_a_last_one_that_is_smaller(monkeypatch):
    monkeypatch.setattr(swiglu_launch, "forward_config", lambda *args: swiglu_launch.HALF_BY_DESCRIPTOR[-1])
    check(make_inputs((1, 64 * (swiglu_launch.GROUP + 2) - 5, 16, 40), FP16))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("biased", [False, True])
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
def test_mlp_matches_reference(shape, out, dtype, biased, fused, monkeypatch):
    monkeypatch.setattr(swiglu_launch, "IMPLEMENTATIONS", ("fused",) if fused else ("cublas",))
    check((make_biased_inputs if biased else make_mlp_inputs)(shape, dtype, out=out))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mlp_on_strided_inputs(layout):
    check(make_mlp_inputs((2, 12, 40, 48), BF16, layout=layout))


def test_halves_of_one_weight_are_read_in_place(monkeypatch):
    inputs = make_mlp_inputs((2, 12, 40, 48), BF16)
    w1, w3 = torch.stack([inputs["w1"], inputs["w3"]])
    monkeypatch.setattr(torch, "stack", None)
    check(inputs | {"w1": w1, "w3": w3})


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


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_the_activation_keeps_its_relative_error_at_every_gate():
    check_silu("cpu")
