"""qk_norm_rope as a user meets it: operators, gradients, compilation, mistakes, costs."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import ddt_kernels
from ddt_fast.model.base import rotary_tables
from ddt_fast.model.reference import RMSNorm, rotate
from ddt_kernels import qk_norm_rope_launch, reference
from kernel_testing import check_compiles, check_replays, compiled_results, poison_empty, with_gradients
from qk_norm_rope_cases import check_against_reference, make_grad, make_inputs
from test_aot import aot, verdicts

SHAPE = (2, 3, 2, 12)
OPS = torch.ops.ddt_kernels
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


def differentiable(inputs):
    return {name: t.detach().requires_grad_(name not in ("cos", "sin")) for name, t in inputs.items()}


def test_opcheck():
    inputs = make_inputs(SHAPE, torch.float32)
    torch.library.opcheck(OPS.qk_norm_rope.default, (*differentiable(inputs).values(), 1e-6))
    torch.library.opcheck(OPS.qk_norm_rope_backward.default, (make_grad(inputs), *inputs.values(), 1e-6))
    torch.library.opcheck(OPS.qk_norm_rope_.default, (*inputs.values(), 1e-6))


@pytest.mark.parametrize("module", [reference, ddt_kernels], ids=["reference", "operator"])
def test_gradcheck(module):
    inputs = differentiable(make_inputs(SHAPE, torch.float64))
    assert torch.autograd.gradcheck(module.qk_norm_rope, tuple(inputs.values()))


@DTYPES
def test_on_a_cpu_the_reference_runs(dtype):
    inputs = make_inputs(SHAPE, dtype)
    expected, kept = reference.qk_norm_rope(*inputs.values()), inputs["qkv"].clone()
    made = ddt_kernels.qk_norm_rope(*inputs.values())
    assert torch.equal(made, expected)
    assert made.is_contiguous()
    assert torch.equal(inputs["qkv"], kept)
    assert ddt_kernels.qk_norm_rope_(*inputs.values()) is inputs["qkv"]
    assert torch.equal(inputs["qkv"], expected)


@DTYPES
def test_the_reference_is_the_models_attention(dtype):
    qkv, weight = torch.randn(2, 24, 3, 3, 20).to(dtype), torch.randn(20).to(dtype)
    cos, sin = rotary_tables(20, 4, 6)
    norm = RMSNorm(20).to(dtype)
    norm.weight.data.copy_(weight)
    q, k, v = qkv.unbind(2)
    expected = torch.stack([rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v], dim=2)
    assert torch.equal(reference.qk_norm_rope(qkv, weight, weight, cos, sin), expected)


def test_compiles_without_graph_breaks():
    inputs = make_inputs(SHAPE, torch.float32)
    tables, grad = (inputs["cos"], inputs["sin"]), make_grad(inputs)

    def function(qkv, q_weight, k_weight):
        return ddt_kernels.qk_norm_rope(qkv, q_weight, k_weight, *tables)

    def operator(qkv, q_weight, k_weight):
        return OPS.qk_norm_rope.default(qkv, q_weight, k_weight, *tables, 1e-6)

    check_compiles(function, operator, list(inputs.values())[:3], [grad])


def test_in_place_compiles_without_graph_breaks():
    inputs = make_inputs(SHAPE, torch.float32, strided=False)
    expected = reference.qk_norm_rope(*inputs.values())

    def function(qkv, *others):
        return ddt_kernels.qk_norm_rope_(qkv * 1, *others)

    def operator(qkv, *others):
        qkv = qkv * 1
        OPS.qk_norm_rope_.default(qkv, *others, 1e-6)
        return qkv

    for compiled, opaque in ((function, False), (operator, True), (ddt_kernels.qk_norm_rope_, False)):
        (made,), _, operators = compiled_results(compiled, list(inputs.values()))
        assert bool(operators) == opaque
        assert torch.equal(made, expected)
    assert torch.equal(inputs["qkv"], expected)


def test_in_place_under_vmap():
    inputs = make_inputs((3, *SHAPE[1:]), torch.float32, strided=False)
    qkv, q_weight, *others = inputs.values()
    weights = torch.stack([q_weight, 2 * q_weight, 3 * q_weight])
    expected = [
        ddt_kernels.qk_norm_rope(sample[None], weight, *others) for sample, weight in zip(qkv, weights, strict=True)
    ]
    batched = qkv[:, None].movedim(0, 2)
    made = torch.vmap(ddt_kernels.qk_norm_rope_, (2, 0, None, None, None))(batched, weights, *others)
    assert torch.equal(made, torch.stack(expected))
    assert torch.equal(qkv, torch.cat(expected))
    for one, axis in ((qkv, None), (qkv.expand(3, *qkv.shape), 0)):
        with pytest.raises(ValueError, match="qk_norm_rope_: qkv is one for all of vmap's; wanted one for each, or qk"):
            torch.vmap(ddt_kernels.qk_norm_rope_, (axis, 0, None, None, None))(one, weights, *others)


def test_compiled_in_place_it_works_on_the_output_of_the_gemm_before():
    inputs = make_inputs((2, 16, 2, 12), torch.float32)
    others = list(inputs.values())[1:]
    x, projection = torch.randn(2, 16, 24), torch.randn(24, 72)

    def layer(x):
        qkv = (x @ projection).unflatten(-1, (3, 2, 12))
        OPS.qk_norm_rope_.default(qkv, *others, 1e-6)
        return qkv[:, :, 0] + 1

    torch._dynamo.reset()
    made, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
    torch.testing.assert_close(made, layer(x))
    assert code.count("= empty_strided_cpu(") == 2  # the GEMM's output and the sum: no copy of the first


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return ddt_kernels.qk_norm_rope(*inputs)

    graph = torch.export.export(Module(), tuple(make_inputs(SHAPE, torch.float32).values())).graph
    assert any(node.target == OPS.qk_norm_rope.default for node in graph.nodes)


def test_second_derivatives_are_refused():
    inputs = differentiable(make_inputs(SHAPE, torch.float32))
    qkv = inputs["qkv"]
    (grad,) = torch.autograd.grad(ddt_kernels.qk_norm_rope(*inputs.values()).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), qkv)


def strided_heads(t):
    return t.mT.contiguous().mT


MISTAKES = [
    ("qkv", lambda t: t[0], r"qkv is of shape \(3, 3, 2, 12\); wanted shape \(B, N, 3, H, D\)"),
    ("qkv", lambda t: t[:, :, :2], r"qkv is of shape \(2, 3, 2, 2, 12\); wanted shape \(B, N, 3, H, D\)"),
    ("qkv", lambda t: t[:, :0], r"qkv is of shape \(2, 0, 3, 2, 12\); wanted B, N and H at least 1"),
    ("qkv", lambda t: t[..., :10], r"qkv is of shape \(2, 3, 3, 2, 10\); wanted .* D a multiple of 4 in 4..256"),
    ("qkv", lambda t: t.new_zeros(1, 1, 3, 1, 260), r"D a multiple of 4 in 4..256"),
    ("qkv", lambda t: t.int(), r"qkv is torch.int32 on cpu; wanted bfloat16, float16 or float32"),
    ("qkv", strided_heads, r"qkv is strided \(216, 72, 24, 1, 2\); wanted its last three dimensions contiguous"),
    ("qkv", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), r"strides \(24, 12, 1\)"),
    ("q_weight", lambda t: t[:8], r"q_weight is of shape \(8,\); wanted \(12,\)"),
    ("k_weight", lambda t: t.half(), r"k_weight is torch.float16; wanted torch.float32"),
    ("k_weight", lambda t: t.to("meta"), r"k_weight is on meta; wanted cpu"),
    ("q_weight", lambda t: t.repeat(2)[::2], r"q_weight is strided \(2,\); wanted a contiguous tensor"),
    ("cos", lambda t: t[:2], r"cos is of shape \(2, 6\); wanted \(3, 6\), one angle per token and pair"),
    ("sin", lambda t: t.repeat(1, 2), r"sin is of shape \(3, 12\); wanted \(3, 6\)"),
    ("sin", lambda t: t.half(), r"sin is torch.float16; wanted torch.float32"),
    ("cos", lambda t: t.mT.contiguous().mT, r"cos is strided \(1, 3\); wanted a contiguous tensor"),
    ("cos", lambda t: t.to("meta"), r"cos is on meta; wanted cpu"),
    ("sin", lambda t: t.clone().requires_grad_(), r"sin is to be differentiated; wanted a table without gradient"),
]


@pytest.mark.parametrize("op", ["qk_norm_rope", "qk_norm_rope_"])
@pytest.mark.parametrize(("name", "change", "message"), MISTAKES)
def test_mistakes_are_value_errors(op, name, change, message):
    inputs = make_inputs(SHAPE, torch.float32, strided=False)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        getattr(ddt_kernels, op)(*inputs.values())


@pytest.mark.parametrize("eps", [0, -1e-6, float("nan")])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match=f"qk_norm_rope: eps is {eps}; wanted a finite number above 0"):
        ddt_kernels.qk_norm_rope(*make_inputs(SHAPE, torch.float32).values(), eps=eps)


def test_in_place_refuses_to_be_differentiated():
    for name in ("qkv", "q_weight", "k_weight"):
        inputs = make_inputs(SHAPE, torch.float32)
        inputs[name].requires_grad_()
        with pytest.raises(ValueError, match=f"qk_norm_rope_: {name} is to be differentiated; wanted torch.no_grad"):
            ddt_kernels.qk_norm_rope_(*inputs.values())
        with torch.no_grad():
            ddt_kernels.qk_norm_rope_(*inputs.values())


@pytest.mark.parametrize("axis", [0, 1])
def test_in_place_refuses_elements_that_share_memory(axis):
    inputs = make_inputs((2, 3, 2, 12), torch.float32, strided=False)
    shared = inputs["qkv"].narrow(axis, 0, 1).expand_as(inputs["qkv"])
    with pytest.raises(ValueError, match=r"qkv is strided .*, which overlaps itself; wanted memory of its own"):
        ddt_kernels.qk_norm_rope_(*(inputs | {"qkv": shared}).values())
    made = ddt_kernels.qk_norm_rope(*(inputs | {"qkv": shared}).values())
    assert torch.equal(made, reference.qk_norm_rope(*(inputs | {"qkv": shared}).values()))


def test_cost_is_what_the_operators_read_and_write():
    inputs = make_inputs(SHAPE, torch.bfloat16)
    inputs["qkv"] = inputs["qkv"].contiguous()
    v_bytes = inputs["qkv"].numel() // 3 * 2
    grad = make_grad(inputs)

    def size(*tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    made = OPS.qk_norm_rope(*inputs.values(), 1e-6)
    cost = ddt_kernels.qk_norm_rope_cost(*SHAPE, torch.bfloat16)
    assert cost.bytes_moved == size(*inputs.values(), made)
    in_place = ddt_kernels.qk_norm_rope_cost(*SHAPE, torch.bfloat16, in_place=True)
    assert in_place.bytes_moved == size(*inputs.values(), made) - 2 * v_bytes
    assert in_place.flops == cost.flops
    gradients = OPS.qk_norm_rope_backward(grad, *inputs.values(), 1e-6)
    backward = ddt_kernels.qk_norm_rope_cost(*SHAPE, torch.bfloat16, backward=True)
    assert backward.bytes_moved == size(grad, *inputs.values(), *gradients) - v_bytes
    assert 2 * cost.flops <= backward.flops <= 3 * cost.flops
    with pytest.raises(ValueError, match="in_place is True for a backward pass; wanted False"):
        ddt_kernels.qk_norm_rope_cost(*SHAPE, torch.bfloat16, backward=True, in_place=True)


@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_cover_every_head(element_size):
    for head_dim in range(4, 256 + 1, 4):
        for heads in (1, 2, 12, 16, 24):
            config = qk_norm_rope_launch.tile_config(heads, head_dim, element_size)
            sizes = (config.main, config.lanes, config.lane_heads, config.rows, config.tail or 1)
            assert all(size > 0 and size & (size - 1) == 0 for size in sizes)
            assert config.main <= head_dim <= config.main + config.tail
            assert config.main * element_size // config.lanes <= 16
            assert config.main // config.lanes >= 2  # a lane has whole pairs
            assert config.tail == 0 or config.tail // config.lanes >= 2
            assert config.tokens * config.lane_heads == config.rows


def test_backward_programs_have_enough_tokens_and_no_more():
    assert qk_norm_rope_launch.tokens_per_program(128, 256, 4) == 16
    assert qk_norm_rope_launch.tokens_per_program(16, 256, 4) == 8
    assert qk_norm_rope_launch.tokens_per_program(1, 256, 4) == 4
    assert qk_norm_rope_launch.tokens_per_program(1, 1, 32) == 32


def test_the_forward_kernels_exchange_nothing():
    result = aot("--module", "ddt_kernels.qk_norm_rope_launch", "--kernel", "qk_norm_rope_forward", "--arch", "90")
    rows = verdicts(result)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(rows) == 5
    assert {row[2] for row in rows.values()} == {"0"}, result.stdout  # bytes of shared memory


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    "shape", [(3, 24, 3, 72), (8, 256, 16, 72), (20, 256, 16, 72), (2, 40, 5, 20), (3, 1, 12, 64), (2, 9, 2, 256)]
)
def test_on_a_gpu(dtype, shape, monkeypatch):
    poison_empty(monkeypatch)
    inputs = make_inputs(shape, dtype, device="cuda")
    tables, grad = (inputs["cos"], inputs["sin"]), make_grad(inputs)
    outputs, gradients = with_gradients(
        lambda *leaves: ddt_kernels.qk_norm_rope(*leaves, *tables), list(inputs.values())[:3], [grad]
    )
    check_against_reference(inputs, grad, outputs[0], gradients)
    ddt_kernels.qk_norm_rope_(*inputs.values())
    assert torch.equal(inputs["qkv"], outputs[0])


@pytest.mark.gpu
def test_cuda_graph_replays_forward_in_place_and_backward():
    inputs = make_inputs((4, 256, 16, 72), torch.bfloat16, device="cuda")
    grad, source, buffer = make_grad(inputs), inputs["qkv"], inputs["qkv"].clone()
    others = list(inputs.values())[1:]

    def run():
        buffer.copy_(source)
        OPS.qk_norm_rope_(buffer, *others, 1e-6)
        forward = OPS.qk_norm_rope(source, *others, 1e-6)
        return [forward, buffer, *OPS.qk_norm_rope_backward(grad, source, *others, 1e-6)]

    check_replays(run)
