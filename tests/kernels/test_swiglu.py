"""swiglu as a user meets it: operator, gradients, compilation, mistakes, costs; and its machine code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ddt_kernels
from ddt_kernels import reference, swiglu_launch
from kernel_testing import check_compiles, check_replays, poison_empty, with_gradients
from swiglu_cases import LAYOUTS, NAMES, check_against_reference, make_grad, make_inputs

KERNELS = Path(__file__).parents[2] / "kernels"
SHAPE = (2, 3, 20, 12)
OPERATOR, BACKWARD = torch.ops.ddt_kernels.swiglu.default, torch.ops.ddt_kernels.swiglu_backward.default
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


def leaves(shape=SHAPE, dtype=torch.float32, **options):
    return [tensor.detach().requires_grad_() for tensor in make_inputs(shape, dtype, **options).values()]


class Keeps(TorchDispatchMode):
    """Records the `keep` of every forward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is OPERATOR:
            self.seen.append(args[3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, keep):
    torch.library.opcheck(OPERATOR, (*leaves(layout=layout), keep))


def test_opcheck_backward():
    inputs = make_inputs(SHAPE, torch.float32)
    gate_up = OPERATOR(*inputs.values(), True)[1]
    torch.library.opcheck(BACKWARD, (make_grad(inputs), *inputs.values(), gate_up))


@pytest.mark.parametrize("function", [reference.swiglu, ddt_kernels.swiglu], ids=["reference", "operator"])
def test_gradcheck(function):
    assert torch.autograd.gradcheck(function, leaves(dtype=torch.float64))


def test_reference_backward_is_the_gradient():
    inputs = make_inputs(SHAPE, torch.float64)
    grad = make_grad(inputs)
    gate_up = torch.cat([inputs["x"] @ inputs["w1"].T, inputs["x"] @ inputs["w3"].T], -1)
    expected = with_gradients(reference.swiglu, list(inputs.values()), [grad])[1]
    torch.testing.assert_close(list(reference.swiglu_backward(grad, *inputs.values(), gate_up)), expected)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_cpu_the_reference_runs(dtype, layout):
    inputs = make_inputs((2, 5, 72, 170), dtype, layout=layout)
    grad = make_grad(inputs)
    (y,), gradients = with_gradients(ddt_kernels.swiglu, list(inputs.values()), [grad])
    assert torch.equal(y, reference.swiglu(*inputs.values()))
    assert torch.equal(y, ddt_kernels.swiglu(*inputs.values()))
    assert y.is_contiguous()
    check_against_reference(inputs, grad, y, dict(zip(NAMES, gradients, strict=True)))


@pytest.mark.parametrize("lead", [(4,), (1, 4), (2, 2, 3)])
def test_any_leading_dimensions(lead):
    x, w1, w3 = leaves()
    x = torch.randn(*lead, 20, requires_grad=True)
    y = ddt_kernels.swiglu(x, w1, w3)
    assert y.shape == (*lead, 12)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_compiles_without_graph_breaks():
    inputs = make_inputs(SHAPE, torch.float32)
    grad = make_grad(inputs)
    check_compiles(ddt_kernels.swiglu, lambda *i: OPERATOR(*i, True)[0], list(inputs.values()), [grad])


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, x, w1, w3):
            return ddt_kernels.swiglu(x, w1, w3)

    graph = torch.export.export(Module(), tuple(make_inputs(SHAPE, torch.float32).values())).graph
    (node,) = [node for node in graph.nodes if node.target == OPERATOR]
    assert node.args[3] is False


def test_inference_writes_nothing_for_a_backward_pass():
    inputs = leaves()
    with Keeps() as keeps:
        with torch.no_grad():
            ddt_kernels.swiglu(*inputs)
        ddt_kernels.swiglu(*(tensor.detach() for tensor in inputs))
        ddt_kernels.swiglu(inputs[0].detach(), inputs[1], inputs[2].detach())
    assert keeps.seen == [False, False, True]


def test_checkpointing_keeps_nothing_in_between():
    inputs = leaves()
    expected = torch.autograd.grad(ddt_kernels.swiglu(*inputs).square().sum(), inputs)
    with Keeps() as keeps:
        y = checkpoint(ddt_kernels.swiglu, *inputs, use_reentrant=True)
    assert keeps.seen == [False]
    y.square().sum().backward()
    for tensor, wanted in zip(inputs, expected, strict=True):
        assert torch.equal(tensor.grad, wanted)


def test_what_was_not_kept_is_recomputed():
    inputs = leaves()
    kept, recomputed = (torch.autograd.grad(OPERATOR(*inputs, keep)[0].sum(), inputs) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    assert not OPERATOR(*inputs, True)[1].requires_grad


def test_second_derivatives_are_refused():
    inputs = leaves()
    (grad,) = torch.autograd.grad(ddt_kernels.swiglu(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), inputs[:1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0, 0], r"x is of shape \(20,\); wanted shape \(\.\.\., C\)"),
        ("x", lambda t: t[:, :0], r"x is of shape \(2, 0, 20\); wanted shape \(\.\.\., C\)"),
        ("x", lambda t: t.int(), r"x is torch.int32 on cpu; wanted bfloat16, float16 or float32"),
        ("x", lambda t: t.to("meta").double(), r"x is torch.float64 on meta; wanted .* \(float64 on a CPU only\)"),
        ("x", lambda t: t.mT.contiguous().mT, r"x is strided \(60, 1, 3\); wanted a last stride of 1"),
        ("w1", lambda t: t[:, :19], r"w1 is of shape \(12, 19\); wanted shape \(F, 20\), as x's last dimension"),
        ("w1", lambda t: t[0], r"w1 is of shape \(20,\); wanted shape \(F, 20\)"),
        ("w1", lambda t: t[:0], r"w1 is of shape \(0, 20\); wanted shape \(F, 20\)"),
        ("w1", lambda t: t.half(), r"w1 is torch.float16; wanted torch.float32"),
        ("w1", lambda t: t.to("meta"), r"w1 is on meta; wanted cpu"),
        ("w1", lambda t: t.T.contiguous().T, r"w1 is strided \(1, 12\); wanted a last stride of 1"),
        ("w3", lambda t: t[:11], r"w3 is of shape \(11, 20\); wanted \(12, 20\), as w1"),
        ("w3", lambda t: t.T, r"w3 is of shape \(20, 12\); wanted shape \(F, 20\)"),
        ("w3", lambda t: t.bfloat16(), r"w3 is torch.bfloat16; wanted torch.float32"),
        ("w3", lambda t: t.to("meta"), r"w3 is on meta; wanted cpu"),
        ("w3", lambda t: t.T.contiguous().T, r"w3 is strided \(1, 12\); wanted a last stride of 1"),
    ],
)
def test_mistakes_are_value_errors(name, change, message):
    inputs = make_inputs(SHAPE, torch.float32)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=f"swiglu: {message}"):
        ddt_kernels.swiglu(*inputs.values())


@pytest.mark.parametrize("training", [False, True])
def test_cost_is_what_the_operators_read_and_write(training):
    inputs = make_inputs(SHAPE, torch.bfloat16)
    tensors = [*inputs.values(), *OPERATOR(*inputs.values(), training)]
    cost = ddt_kernels.swiglu_cost(*SHAPE, torch.bfloat16, training)
    B, N, C, F = SHAPE
    assert cost.bytes_moved == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert 0 < cost.flops - 2 * 2 * B * N * C * F <= 10 * B * N * F


def test_cost_of_the_backward_pass():
    inputs = make_inputs(SHAPE, torch.bfloat16)
    gate_up = OPERATOR(*inputs.values(), True)[1]
    args = (make_grad(inputs), *inputs.values(), gate_up)
    cost = ddt_kernels.swiglu_cost(*SHAPE, torch.bfloat16, backward=True)
    B, N, C, F = SHAPE
    assert cost.bytes_moved == sum(tensor.numel() * tensor.element_size() for tensor in (*args, *BACKWARD(*args)))
    assert 0 < cost.flops - 4 * 2 * B * N * C * F <= 20 * B * N * F


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


@pytest.mark.parametrize(
    ("arch", "expected"), [(75, 80), (80, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80)]
)
def test_architecture_families(arch, expected):
    assert swiglu_launch.family(arch) == expected


# Compiles the 128x128 tile of the XL/2 forward for sm_90 and prints, of its machine code, the wgmmas and the waits for
# them, in order.
DISASSEMBLE = """
import re, subprocess, sys, tempfile, torch
from triton import knobs
from triton.runtime import driver
from ddt_kernels import compilation, runtime, swiglu_launch

def show(kernel, args, meta):
    if (meta["BLOCK_M"], meta["BLOCK_F"]) != (128, 128):
        return
    binary = kernel.warmup(*args, grid=(1,), **(meta | {"FLATTEN": sys.argv[2] == "flatten"}))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        code = subprocess.run([knobs.nvidia.nvdisasm.path, file.name], check=True, capture_output=True, text=True)
    found = re.finditer(r"HGMMA|DEPBAR\\.LE gsb0, (0x\\d)", code.stdout)
    print(" ".join(match.group(1) or "wgmma" for match in found))

x, w = (torch.empty(rows, 1152, dtype=torch.bfloat16, device="meta") for rows in (16384, 3072))
driver.set_active(compilation._StandInDriver(90))
with runtime.recording(show):
    swiglu_launch.launch_forward(x, w, w, sys.argv[1] == "keep", False)
"""


def waits(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", DISASSEMBLE, *arguments]
    result = subprocess.run(command, cwd=KERNELS, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("keep", ["keep", "inference"])
def test_wgmmas_are_in_flight_together(keep):
    steps = " ".join(["wgmma"] * 8)  # two accumulators, 64 channels
    assert waits(keep, "as shipped") == f"{steps} 0x2 0x0"


def test_why_the_loops_are_not_fused_on_sm_90():
    assert "wgmma 0x0 wgmma 0x0 wgmma" in waits("inference", "flatten")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 24, 72, 170), (2, 40, 341, 909), (1, 40, 64, 170), (8, 256, 1152, 3072), (1, 256, 1152, 3072)]
)
def test_on_a_gpu(dtype, layout, shape, monkeypatch):
    poison_empty(monkeypatch)
    inputs = make_inputs(shape, dtype, device="cuda", layout=layout)
    grad = make_grad(inputs)
    (y,), gradients = with_gradients(ddt_kernels.swiglu, list(inputs.values()), [grad])
    check_against_reference(inputs, grad, y, dict(zip(NAMES, gradients, strict=True)))
    with torch.no_grad():
        assert torch.equal(ddt_kernels.swiglu(*inputs.values()), y)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 65, 128, 129, 256, 257, 4096])
def test_any_number_of_rows_on_a_gpu(rows, monkeypatch):
    poison_empty(monkeypatch)
    inputs = make_inputs((1, rows, 1152, 3072), torch.bfloat16, device="cuda")
    check_against_reference(inputs, make_grad(inputs), ddt_kernels.swiglu(*inputs.values()), {})


@pytest.mark.gpu
def test_tf32_only_where_torch_allows_it(monkeypatch):
    inputs = make_inputs((1, 256, 1152, 3072), torch.float32, device="cuda")
    oracle = reference.swiglu(*(tensor.double() for tensor in inputs.values()))

    def error():
        return (ddt_kernels.swiglu(*inputs.values()) - oracle).abs().max().item()

    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    exact = error()
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert exact < 1e-4 < error()


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward():
    inputs = list(make_inputs((4, 256, 1152, 3072), torch.bfloat16, device="cuda").values())
    grad = torch.randn(4, 256, 3072, device="cuda").bfloat16()

    def run():
        y, gate_up = OPERATOR(*inputs, True)
        return [OPERATOR(*inputs, False)[0], y, gate_up, *BACKWARD(grad, *inputs, gate_up)]

    check_replays(run)
