"""qkv_attention's launchers: bit for bit what those of qk_norm_rope and attention make, one after the other."""

import pytest
import torch

from ddt_kernels import attention_launch, qk_norm_rope_launch, reference
from ddt_kernels.qkv_attention import launch_backward, launch_forward
from kernel_testing import BF16, FP16, FP32, assert_all_equal, check_against_reference, poison_empty
from qk_norm_rope_cases import FIXED, make_inputs

CASES = [((2, 5, 3, 72), BF16), ((1, 70, 1, 72), BF16), ((1, 1, 2, 24), BF16), ((1, 33, 1, 80), BF16)]
CASES += [((2, 9, 2, 128), BF16), ((1, 6, 3, 20), BF16), ((2, 5, 2, 72), FP16), ((1, 18, 1, 44), FP32)]


def random_grad(inputs, seed=1):
    shape = inputs["qkv"][:, :, 0].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(inputs["qkv"].dtype)


def one_after_the_other(inputs, grad, scale):
    """(out, lse, gradients) by the two ops' launchers, the gradients of q, k and v put side by side between them."""
    arguments = (*inputs.values(), 1e-6)
    heads = qk_norm_rope_launch.launch_forward(*arguments, torch.zeros_like(inputs["qkv"])).unbind(2)
    out, lse = attention_launch.launch_forward(*heads, scale)
    packed = torch.stack(attention_launch.launch_backward(grad, out, lse, *heads, scale), 2)
    return out, lse, *qk_norm_rope_launch.launch_backward(packed, *arguments)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_is_the_two_ops_bit_for_bit(shape, dtype, arch, monkeypatch):
    monkeypatch.setattr(attention_launch, "target_arch", lambda device: arch)
    inputs, scale = make_inputs(shape, dtype), 0.3
    grad, before = random_grad(inputs), inputs["qkv"].clone()
    expected = one_after_the_other(inputs, grad, scale)
    poison_empty(monkeypatch)
    out, lse = launch_forward(*inputs.values(), 1e-6, scale)
    gradients = launch_backward(grad, out, lse, (*inputs.values(), 1e-6), scale)
    assert_all_equal((out, lse, *gradients), expected)
    assert gradients[0].is_contiguous()
    assert torch.equal(inputs["qkv"], before)


@pytest.mark.parametrize(("shape", "dtype"), [((1, 21, 2, 72), BF16), ((1, 21, 2, 24), FP32)])
def test_matches_reference(shape, dtype):
    inputs = make_inputs(shape, dtype, strided=False)
    grad, scale = random_grad(inputs), shape[-1] ** -0.5
    out, lse = launch_forward(*inputs.values(), 1e-6, scale)
    made = launch_backward(grad, out, lse, (*inputs.values(), 1e-6), scale)
    gradients = dict(zip(inputs, made, strict=False))  # the tables, last, have none
    check_against_reference(reference.qkv_attention, inputs, [out], [grad], gradients, FIXED)
