"""What holds for every op: triton missing, no atomics, checkpointing, arguments that are no tensors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ddt_kernels

KERNELS = Path(__file__).parents[2] / "kernels"

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, ddt_kernels
from ddt_kernels.norm_launch import launch_forward
x, weight, shift = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8), torch.zeros(2, 1, 8)
y = ddt_kernels.rms_norm_modulate(x, weight, shift, shift)
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
y.square().mean().backward()
assert x.grad.isfinite().all()
try:
    launch_forward(x, None, None, weight, shift, shift, 1e-6, "rms", False)
except RuntimeError as error:
    assert "norm_modulate_forward_kernel is a Triton kernel and triton is not installed" in str(error)
else:
    raise AssertionError("launched without triton")
print("done")
"""


def test_without_triton_the_package_imports_and_its_cpu_kernels_run():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=KERNELS, capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr


@pytest.mark.parametrize("source", sorted((KERNELS / "ddt_kernels").glob("*.py")), ids=lambda path: path.name)
def test_no_kernel_uses_atomics(source):
    """Sums over programs have a fixed order: that is why gradients repeat, which a serial interpreter cannot show."""
    assert "tl.atomic" not in source.read_text()


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def rotary(tokens, pairs):
    angles = torch.rand(tokens, pairs)
    return angles.cos(), angles.sin()


ROWS, MOD, WEIGHT = (2, 3, 8), (2, 1, 8), (8,)
CALLS = {
    "rms_norm_modulate": (lambda *a: ddt_kernels.rms_norm_modulate(*a), (ROWS, WEIGHT, MOD, MOD)),
    "gated_residual_rms_norm_modulate": (
        lambda *a: torch.cat(ddt_kernels.gated_residual_rms_norm_modulate(*a)),
        (ROWS, ROWS, MOD, WEIGHT, MOD, MOD),
    ),
    "gated_residual_layer_norm_modulate": (
        lambda *a: ddt_kernels.gated_residual_layer_norm_modulate(*a),
        (ROWS, ROWS, MOD, MOD, MOD),
    ),
    "gated_residual": (lambda *a: ddt_kernels.gated_residual(*a), (ROWS, ROWS, MOD)),
    "qk_norm_rope": (lambda *a: ddt_kernels.qk_norm_rope(*a, *rotary_tables), ((2, 3, 3, 2, 8), WEIGHT, WEIGHT)),
    "qkv_attention": (lambda *a: ddt_kernels.qkv_attention(*a, *rotary_tables), ((2, 3, 3, 2, 8), WEIGHT, WEIGHT)),
    "swiglu": (lambda *a: ddt_kernels.swiglu(*a), (ROWS, (5, 8), (5, 8))),
    "swiglu_mlp": (lambda *a: ddt_kernels.swiglu_mlp(*a), (ROWS, (5, 8), (5, 8), (8, 5))),
    "attention": (lambda *a: ddt_kernels.attention(*a), ((2, 3, 2, 8),) * 3),
}
rotary_tables = rotary(3, 4)


@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_is_refused(op):
    function, shapes = CALLS[op]
    inputs = [torch.randn(shape) for shape in shapes]
    for i, tensor in enumerate(inputs):
        rest = lambda dual, i=i: function(*inputs[:i], dual, *inputs[i + 1 :])  # noqa: E731
        with pytest.raises(ValueError, match="is a dual tensor of forward-mode differentiation; wanted reverse mode"):
            torch.func.jvp(rest, (tensor,), (torch.ones_like(tensor),))
    with torch.autograd.forward_ad.dual_level():
        assert function(*inputs).isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_checkpointing_gives_the_same_gradients(op, use_reentrant):
    function, shapes = CALLS[op]
    inputs = leaves(*shapes)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    checkpoint(function, *inputs, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, wanted in zip(inputs, expected, strict=True):
        assert torch.equal(tensor.grad, wanted)


@pytest.mark.parametrize("wrong", [None, 1.0, [1.0], np.ones(3)])
@pytest.mark.parametrize("op", CALLS)
def test_what_is_no_tensor_is_named(op, wrong):
    function, shapes = CALLS[op]
    for position in range(len(shapes)):
        arguments = leaves(*shapes)
        arguments[position] = wrong
        with pytest.raises(ValueError, match=rf"^{op}: \w+ is a {type(wrong).__name__}; wanted a torch.Tensor$"):
            function(*arguments)


@pytest.mark.parametrize("eps", ["a", None, 0.0, -1.0, float("nan"), float("inf")])
def test_eps_is_a_finite_positive_number(eps):
    with pytest.raises(ValueError, match=r"rms_norm_modulate: eps is .*; wanted a finite number above 0"):
        ddt_kernels.rms_norm_modulate(*leaves(ROWS, WEIGHT, MOD, MOD), eps=eps)


def test_strides_past_32_bits_are_refused():
    far = torch.empty(1, device="meta").as_strided((1, 2, 2, 8), (2**33, 2**31 // 128, 8, 1))
    with pytest.raises(ValueError, match=r"attention: q is strided .*call \.contiguous\(\)"):
        ddt_kernels.attention(far, far, far)
