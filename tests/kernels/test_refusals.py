"""Bad arguments and their messages: one table for the differentiable operators.

Refusals that apply to every argument of every operator are in test_operators.py.
"""

import pytest
import torch

import ddt_kernels
from operators import OPERATORS

BY_NAME = {str(op): op for op in OPERATORS}
NORM, QK, ATTENTION = "gated_residual_rms_norm_modulate-sample", "qk_norm_rope", "attention"
QKV, SWIGLU, MLP = "qkv_attention", "swiglu", "swiglu_mlp"
MISTAKES = [
    (NORM, "x", lambda t: t[0], r"x has shape \(3, 20\); expected shape \(B, N, C\)"),
    (NORM, "x", lambda t: t[:, :0], r"x has shape \(2, 0, 20\); expected B and N at least 1, C in 1..6144"),
    (NORM, "x", lambda t: t.new_zeros(1, 1, 6145), r"x has shape .* C in 1..6144"),
    (NORM, "branch", lambda t: t[:, :2], r"branch has shape \(2, 2, 20\); expected \(2, 3, 20\)"),
    (NORM, "weight", lambda t: t[:19], r"weight has shape \(19,\); expected \(20,\)"),
    (NORM, "gate", lambda t: t[:, 0], r"gate has shape .*; expected \(2, 1, 20\) \(per sample\) or \(2, 3, 20\)"),
    (NORM, "gate", lambda t: t.expand(2, 2, 20), r"gate has shape .*; expected \(2, 1, 20\) \(per sample\)"),
    (NORM, "shift", lambda t: t.expand(2, 3, 20), r"shift has shape \(2, 3, 20\); expected \(2, 1, 20\), "),
    (NORM, "scale", lambda t: t[:1], r"scale has shape \(1, 1, 20\); expected \(2, 1, 20\)"),
    (QK, "qkv", lambda t: t[0], r"qkv has shape \(3, 3, 2, 12\); expected shape \(B, N, 3, H, D\)"),
    (QK, "qkv", lambda t: t[:, :, :2], r"qkv has shape \(2, 3, 2, 2, 12\); expected shape \(B, N, 3, H, D\)"),
    (QK, "qkv", lambda t: t[:, :0], r"qkv has shape \(2, 0, 3, 2, 12\); expected B, N and H at least 1"),
    (QK, "qkv", lambda t: t[..., :10], r"qkv has shape \(2, 3, 3, 2, 10\); .* D a multiple of 4 in 4..256"),
    (QK, "qkv", lambda t: t.new_zeros(1, 1, 3, 1, 260), r"qkv has shape .* D a multiple of 4 in 4..256"),
    (QK, "qkv", lambda t: t.mT.contiguous().mT, r"qkv has strides \(216, 72, 24, 1, 2\); expected its last three"),
    (QK, "qkv", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), r"qkv has strides .* strides \(24, 12, 1\)"),
    (QK, "q_weight", lambda t: t[:8], r"q_weight has shape \(8,\); expected \(12,\)"),
    (QK, "cos", lambda t: t[:2], r"cos has shape \(2, 6\); expected \(3, 6\), one angle per token and pair"),
    (QK, "sin", lambda t: t.repeat(1, 2), r"sin has shape \(3, 12\); expected \(3, 6\)"),
    (QK, "sin", lambda t: t.clone().requires_grad_(), r"sin requires a gradient; expected a table without one"),
    (ATTENTION, "q", lambda t: t[0], r"q has shape \(5, 3, 12\); expected shape \(B, N, H, D\)"),
    (ATTENTION, "q", lambda t: t[:, :0], r"q has shape \(2, 0, 3, 12\); expected B, N and H at least 1, D a multiple"),
    (ATTENTION, "q", lambda t: t[..., :10], r"q has shape \(2, 5, 3, 10\); expected .* D a multiple of 4 in 4..128"),
    (ATTENTION, "q", lambda t: t[..., :0], r"q has shape \(2, 5, 3, 0\); expected .* in 4..128"),
    (ATTENTION, "q", lambda t: t.new_zeros(2, 5, 3, 132), r"q has shape \(2, 5, 3, 132\); expected .* in 4..128"),
    (ATTENTION, "k", lambda t: t[:, :4], r"k has shape \(2, 4, 3, 12\); expected \(2, 5, 3, 12\), like the first"),
    (ATTENTION, "v", lambda t: t[..., :8], r"v has shape \(2, 5, 3, 8\); expected \(2, 5, 3, 12\)"),
    (QKV, "qkv", lambda t: t[:, :, :2], r"qkv has shape \(2, 5, 2, 3, 12\); expected shape \(B, N, 3, H, D\)"),
    (QKV, "qkv", lambda t: t.new_zeros(1, 5, 3, 2, 132), r"qkv has shape \(1, 5, 3, 2, 132\); .* D a .* in 4..128"),
    (QKV, "sin", lambda t: t.clone().requires_grad_(), r"sin requires a gradient; expected a table without one"),
    (SWIGLU, "x", lambda t: t[0, 0], r"x has shape \(20,\); expected shape \(\.\.\., C\)"),
    (SWIGLU, "x", lambda t: t[:, :0], r"x has shape \(2, 0, 20\); expected shape \(\.\.\., C\)"),
    (SWIGLU, "w1", lambda t: t[:, :19], r"w1 has shape \(12, 19\); expected shape \(F, 20\), like x's last"),
    (SWIGLU, "w1", lambda t: t[:0], r"w1 has shape \(0, 20\); expected shape \(F, 20\)"),
    (SWIGLU, "w3", lambda t: t[:11], r"w3 has shape \(11, 20\); expected \(12, 20\), like w1"),
    (SWIGLU, "w3", lambda t: t.T, r"w3 has shape \(20, 12\); expected shape \(F, 20\)"),
    (MLP, "x", lambda t: t[0, 0], r"x has shape \(20,\); expected shape \(\.\.\., C\)"),
    (MLP, "w2", lambda t: t[:, :11], r"w2 has shape \(20, 11\); expected shape \(O, 12\), one column per row of w1"),
    (MLP, "w2", lambda t: t[:0], r"w2 has shape \(0, 12\); expected shape \(O, 12\)"),
]


@pytest.mark.parametrize(("op", "name", "change", "message"), MISTAKES)
def test_mistakes_are_value_errors(op, name, change, message):
    inputs = BY_NAME[op].inputs(layout="contiguous")
    inputs[name] = change(inputs[name])
    for function in ("qk_norm_rope", "qk_norm_rope_") if op == QK else (BY_NAME[op].name,):
        with pytest.raises(ValueError, match=f"^{function}: {message}"):
            getattr(ddt_kernels, function)(*inputs.values())


def test_strides_past_32_bits_are_refused():
    far = torch.empty(1, device="meta").as_strided((1, 2, 2, 8), (2**33, 2**31 // 128, 8, 1))
    with pytest.raises(ValueError, match=r"attention: q has strides .*call \.contiguous\(\)"):
        ddt_kernels.attention(far, far, far)
