"""swiglu and swiglu_mlp: what is kept for the backward pass, tiles, machine code."""

import re
import subprocess

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ddt_kernels
from ddt_kernels import reference, runtime, swiglu_launch
from ddt_kernels.compilation import compiling_for
from dispatched import Dispatched
from kernel_testing import (
    BF16,
    COMPILES,
    FP32,
    FP64,
    assert_all_equal,
    check_against_reference,
    kept_for_backward,
    poison_empty,
    with_gradients,
)
from operators import SWIGLU, SWIGLU_MLP
from swiglu_cases import make_grad, make_inputs

BOTH = pytest.mark.parametrize("op", [SWIGLU, SWIGLU_MLP], ids=str)


def keeps(seen):
    """The `keep` of every forward."""
    return [args[-1] for name, args in seen.calls if name in ("swiglu", "swiglu_mlp")]


def test_reference_backward_is_the_gradient():
    inputs = SWIGLU.inputs(FP64)
    grad = make_grad(inputs)
    gate_up = torch.cat([inputs["x"] @ inputs["w1"].T, inputs["x"] @ inputs["w3"].T], -1)
    expected = with_gradients(reference.swiglu, list(inputs.values()), [grad])[1]
    torch.testing.assert_close(list(reference.swiglu_backward(grad, *inputs.values(), gate_up)), expected)


@pytest.mark.parametrize("lead", [(4,), (1, 4), (2, 2, 3)])
def test_any_leading_dimensions(lead):
    _, w1, w3 = SWIGLU.inputs().values()
    x = torch.randn(*lead, 20, requires_grad=True)
    y = ddt_kernels.swiglu(x, w1, w3)
    assert y.shape == (*lead, 12)
    y.sum().backward()
    assert x.grad.shape == x.shape


@BOTH
def test_inference_writes_nothing_for_a_backward_pass(op):
    leaves = op.leaves(op.inputs())
    first, *rest = (leaf.detach() for leaf in leaves)
    with Dispatched() as seen:
        with torch.no_grad():
            op.public(*leaves)
        op.public(first, *rest)
        op.public(first, leaves[1], *rest[1:])
        assert keeps(seen) == [False, False, True]
        checkpoint(op.public, *leaves, use_reentrant=True)
    assert keeps(seen)[3:] == [False]


@BOTH
def test_what_was_not_kept_is_recomputed(op):
    leaves = op.leaves(op.inputs())
    made = [torch.autograd.grad(op.registered(*leaves, keep)[0].sum(), leaves) for keep in (True, False)]
    assert_all_equal(*made)


def test_an_mlp_keeps_two_columns_of_f_instead_of_three_or_four():
    leaves = SWIGLU_MLP.leaves(SWIGLU_MLP.inputs())
    hidden = SWIGLU_MLP.shape[0] * SWIGLU_MLP.shape[1] * SWIGLU_MLP.shape[3]

    def two_ops(x, w1, w3, w2):
        return torch.nn.functional.linear(ddt_kernels.swiglu(x, w1, w3), w2)

    for function, columns in ((ddt_kernels.swiglu_mlp, 2), (two_ops, 3), (reference.swiglu_mlp, 4)):
        kept = kept_for_backward(function, *leaves)
        for leaf in leaves:
            kept.pop(leaf.data_ptr(), None)
        assert sum(kept.values()) == columns * hidden


def chosen(rows, chip=90, configs=swiglu_launch.HALF_BY_DESCRIPTOR):
    config = swiglu_launch.forward_config(rows, 1152, 3072, configs, swiglu_launch.CHIPS[chip])
    return config.block_m, config.block_f


def test_the_tile_follows_the_shape():
    assert [chosen(rows) for rows in (1, 64)] == [(64, 32)] * 2
    assert chosen(128) == (64, 64)
    assert chosen(256) == (128, 64)
    for rows in (512, 1024, 16384, 65536):
        for chip, configs in ((80, swiglu_launch.HALF_BY_POINTER), (90, swiglu_launch.HALF_BY_DESCRIPTOR)):
            assert chosen(rows, chip, configs) == (128, 128)


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("keep", [False, True])
def test_wgmmas_are_in_flight_together(keep, tmp_path):
    """The wgmmas of the 128x128 tile of XL/2's forward on sm_90, and the waits for them."""
    from triton import knobs

    def disassemble(kernel, args, meta):
        if (meta["BLOCK_M"], meta["BLOCK_F"]) == (128, 128):
            file = tmp_path / "kernel.cubin"
            file.write_bytes(kernel.warmup(*args, grid=(1,), **meta).asm["cubin"])
            command = [knobs.nvidia.nvdisasm.path, str(file)]
            found.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    x, w = (torch.empty(rows, 1152, dtype=BF16, device="meta") for rows in (16384, 3072))
    found = []
    with compiling_for(90), runtime.recording(disassemble):
        swiglu_launch.launch_forward(x, w, w, keep, False)
    (code,) = found
    order = [match.group(1) or "wgmma" for match in re.finditer(r"HGMMA|DEPBAR\.LE gsb0, (0x\d)", code)]
    assert order == [*["wgmma"] * 8, "0x2", "0x0"]  # two accumulators, 64 channels


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 65, 128, 129, 256, 257, 4096])
def test_any_number_of_rows_on_a_gpu(rows, monkeypatch):
    poison_empty(monkeypatch)
    inputs = make_inputs((1, rows, 1152, 3072), BF16, device="cuda")
    check_against_reference(reference.swiglu, inputs, [ddt_kernels.swiglu(*inputs.values())])


@pytest.mark.gpu
def test_tf32_only_where_torch_allows_it(monkeypatch):
    inputs = make_inputs((1, 256, 1152, 3072), FP32, device="cuda")
    oracle = reference.swiglu(*(tensor.double() for tensor in inputs.values()))

    def error():
        return (ddt_kernels.swiglu(*inputs.values()) - oracle).abs().max().item()

    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    exact = error()
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert exact < 1e-4 < error()
