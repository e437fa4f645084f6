"""qk_norm_rope: the in-place variant, the model's arithmetic, tiles."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import ddt_kernels
from ddt_fast.model.base import rotary_tables
from ddt_fast.model.reference import RMSNorm, rotate
from ddt_kernels import qk_norm_rope_launch, reference
from kernel_testing import BF16, DTYPES, check_replays, compiled_results
from operators import QK_NORM_ROPE
from qk_norm_rope_cases import make_inputs

SHAPE = (2, 3, 2, 12)
IN_PLACE = torch.ops.ddt_kernels.qk_norm_rope_.default


@DTYPES
@pytest.mark.parametrize(
    ("device", "shape"),
    [("cpu", SHAPE), *(pytest.param("cuda", shape, marks=pytest.mark.gpu) for shape in QK_NORM_ROPE.gpu_shapes)],
)
def test_in_place_it_is_the_same(dtype, device, shape):
    inputs = make_inputs(shape, dtype, device)
    expected = ddt_kernels.qk_norm_rope(*inputs.values())
    assert ddt_kernels.qk_norm_rope_(*inputs.values()) is inputs["qkv"]
    assert torch.equal(inputs["qkv"], expected)


def test_opcheck_in_place():
    torch.library.opcheck(IN_PLACE, (*make_inputs(SHAPE, torch.float32).values(), 1e-6))


@DTYPES
def test_the_reference_is_the_models_attention(dtype):
    qkv, weight = torch.randn(2, 24, 3, 3, 20).to(dtype), torch.randn(20).to(dtype)
    cos, sin = rotary_tables(20, 4, 6)
    norm = RMSNorm(20).to(dtype)
    norm.weight.data.copy_(weight)
    q, k, v = qkv.unbind(2)
    expected = torch.stack([rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v], dim=2)
    assert torch.equal(reference.qk_norm_rope(qkv, weight, weight, cos, sin), expected)


def test_in_place_compiles_without_graph_breaks():
    inputs = make_inputs(SHAPE, torch.float32, strided=False)
    expected = reference.qk_norm_rope(*inputs.values())

    def function(qkv, *others):
        return ddt_kernels.qk_norm_rope_(qkv * 1, *others)

    def operator(qkv, *others):
        qkv = qkv * 1
        IN_PLACE(qkv, *others, 1e-6)
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
    expected = [ddt_kernels.qk_norm_rope(s[None], w, *others) for s, w in zip(qkv, weights, strict=True)]
    batched = qkv[:, None].movedim(0, 2)
    made = torch.vmap(ddt_kernels.qk_norm_rope_, (2, 0, None, None, None))(batched, weights, *others)
    assert torch.equal(made, torch.stack(expected))
    assert torch.equal(qkv, torch.cat(expected))
    for one, axis in ((qkv, None), (qkv.expand(3, *qkv.shape), 0)):
        with pytest.raises(ValueError, match="qkv is shared by all calls of vmap; expected one each, or qk"):
            torch.vmap(ddt_kernels.qk_norm_rope_, (axis, 0, None, None, None))(one, weights, *others)


@pytest.mark.slow
def test_compiled_in_place_it_works_on_the_output_of_the_gemm_before():
    inputs = make_inputs((2, 16, 2, 12), torch.float32)
    others = list(inputs.values())[1:]
    x, projection = torch.randn(2, 16, 24), torch.randn(24, 72)

    def layer(x):
        qkv = (x @ projection).unflatten(-1, (3, 2, 12))
        IN_PLACE(qkv, *others, 1e-6)
        return qkv[:, :, 0] + 1

    torch._dynamo.reset()
    made, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
    torch.testing.assert_close(made, layer(x))
    assert code.count("= empty_strided_cpu(") == 2  # the GEMM's output and the sum: no copy of the first


def test_in_place_refuses_to_be_differentiated():
    for name in ("qkv", "q_weight", "k_weight"):
        inputs = make_inputs(SHAPE, torch.float32)
        inputs[name].requires_grad_()
        with pytest.raises(ValueError, match=f"qk_norm_rope_: {name} requires a gradient; expected torch.no_grad"):
            ddt_kernels.qk_norm_rope_(*inputs.values())
        with torch.no_grad():
            ddt_kernels.qk_norm_rope_(*inputs.values())


@pytest.mark.parametrize("axis", [0, 1])
def test_in_place_refuses_elements_that_share_memory(axis):
    inputs = make_inputs((2, 3, 2, 12), torch.float32, strided=False)
    inputs["qkv"] = inputs["qkv"].narrow(axis, 0, 1).expand_as(inputs["qkv"])
    with pytest.raises(ValueError, match=r"qkv has strides .*, which overlap; expected elements that share no memory"):
        ddt_kernels.qk_norm_rope_(*inputs.values())
    assert torch.equal(ddt_kernels.qk_norm_rope(*inputs.values()), reference.qk_norm_rope(*inputs.values()))


def test_in_place_costs_less_by_v():
    forward, in_place = (ddt_kernels.qk_norm_rope_cost(*SHAPE, BF16, in_place=i) for i in (False, True))
    v_bytes = make_inputs(SHAPE, BF16)["qkv"].numel() // 3 * 2
    assert forward.bytes_moved - in_place.bytes_moved == 2 * v_bytes
    assert in_place.flops == forward.flops
    with pytest.raises(ValueError, match="in_place is True for a backward pass; expected False"):
        ddt_kernels.qk_norm_rope_cost(*SHAPE, BF16, backward=True, in_place=True)


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


@pytest.mark.gpu
def test_cuda_graph_replays_in_place():
    inputs = make_inputs((4, 256, 16, 72), BF16, device="cuda")
    source, *others = inputs.values()
    buffer = source.clone()

    def run():
        buffer.copy_(source)
        IN_PLACE(buffer, *others, 1e-6)
        return [buffer]

    check_replays(run)
