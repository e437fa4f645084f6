"""The norm family as a user meets it: operators, gradients, compilation, mistakes, costs."""

import pytest
import torch

import ddt_kernels
from ddt_kernels import norm_launch, reference
from kernel_testing import check_compiles, check_replays, poison_empty, with_gradients
from norm_cases import OPS, check_against_reference, input_names, make_grads, make_inputs

SHAPE = (2, 3, 20)
GRANULARITIES = pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
EVERY_OP = pytest.mark.parametrize("op", OPS)


def operator(name):
    return getattr(torch.ops.ddt_kernels, name).default


def as_tuple(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def operator_args(op, inputs):
    return [*inputs.values(), *([] if op == "gated_residual" else [1e-6])]


def backward_args(op, inputs, grads):
    """What the op's autograd formula passes on: no shift, and no x where it is not read."""
    kept = [tensor for name, tensor in inputs.items() if name != "shift" and (name, op) != ("x", "gated_residual")]
    return [*grads, *kept, *([] if op == "gated_residual" else [1e-6])]


@EVERY_OP
@GRANULARITIES
def test_opcheck(op, per_token):
    inputs = make_inputs(op, SHAPE, per_token, torch.float32)
    grads = make_grads(op, inputs)
    torch.library.opcheck(operator(f"{op}_backward"), backward_args(op, inputs, grads))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    torch.library.opcheck(operator(op), operator_args(op, leaves))


@EVERY_OP
@GRANULARITIES
@pytest.mark.parametrize("module", [reference, ddt_kernels], ids=["reference", "operator"])
def test_gradcheck(op, per_token, module):
    inputs = [t.requires_grad_() for t in make_inputs(op, SHAPE, per_token, torch.float64, strided=False).values()]
    assert torch.autograd.gradcheck(getattr(module, op), inputs)


@EVERY_OP
@GRANULARITIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_on_a_cpu_the_reference_runs(op, per_token, dtype):
    inputs = list(make_inputs(op, SHAPE, per_token, dtype).values())
    made, expected = getattr(ddt_kernels, op)(*inputs), getattr(reference, op)(*inputs)
    for output, wanted in zip(as_tuple(made), as_tuple(expected), strict=True):
        assert torch.equal(output, wanted)
        assert output.is_contiguous()


@EVERY_OP
@GRANULARITIES
def test_compiles_without_graph_breaks(op, per_token):
    inputs = make_inputs(op, SHAPE, per_token, torch.float32)
    eps = operator_args(op, inputs)[len(inputs) :]
    function = getattr(ddt_kernels, op)
    check_compiles(function, lambda *i: operator(op)(*i, *eps), list(inputs.values()), make_grads(op, inputs))


@EVERY_OP
def test_exports(op):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return getattr(ddt_kernels, op)(*inputs)

    inputs = tuple(make_inputs(op, SHAPE, True, torch.float32).values())
    graph = torch.export.export(Module(), inputs).graph
    assert any(node.target == operator(op) for node in graph.nodes)


def test_second_derivatives_are_refused():
    inputs = [t.requires_grad_() for t in make_inputs("rms_norm_modulate", SHAPE, False, torch.float32).values()]
    (grad,) = torch.autograd.grad(ddt_kernels.rms_norm_modulate(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), inputs[:1])


def test_gradient_of_a_sum_has_no_strides_to_rely_on():
    inputs = [t.requires_grad_() for t in make_inputs("rms_norm_modulate", SHAPE, True, torch.float32).values()]
    ddt_kernels.rms_norm_modulate(*inputs).sum().backward()
    assert torch.equal(inputs[2].grad, torch.ones(SHAPE))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0], r"x is of shape \(3, 20\); wanted shape \(B, N, C\)"),
        ("x", lambda t: t.double().int(), r"x is torch.int32 on cpu; wanted bfloat16, float16 or float32"),
        ("x", lambda t: t[:, :0], r"x is of shape \(2, 0, 20\); wanted B and N at least 1, C in 1..6144"),
        ("x", lambda t: t.new_zeros(1, 1, 6145), r"C in 1..6144"),
        ("x", lambda t: t.mT.contiguous().mT, r"x is strided \(60, 1, 3\); wanted a last stride of 1"),
        ("branch", lambda t: t[:, :2], r"branch is of shape \(2, 2, 20\); wanted \(2, 3, 20\)"),
        ("branch", lambda t: t.half(), r"branch is torch.float16; wanted torch.float32"),
        ("branch", lambda t: t.to("meta"), r"branch is on meta; wanted cpu"),
        ("branch", lambda t: t.mT.contiguous().mT, r"branch is strided"),
        ("weight", lambda t: t[:19], r"weight is of shape \(19,\); wanted \(20,\)"),
        ("weight", lambda t: t.half(), r"weight is torch.float16; wanted torch.float32"),
        ("weight", lambda t: t.to("meta"), r"weight is on meta; wanted cpu"),
        ("weight", lambda t: t.repeat(2)[::2], r"weight is strided \(2,\); wanted a last stride of 1"),
        ("gate", lambda t: t[:, 0], r"gate is of shape \(2, 20\); wanted \(2, 1, 20\) \(per sample\) or \(2, 3, 20\)"),
        ("gate", lambda t: t.expand(2, 2, 20), r"gate is of shape \(2, 2, 20\); wanted \(2, 1, 20\) \(per sample\)"),
        ("shift", lambda t: t.expand(2, 3, 20), r"shift is of shape \(2, 3, 20\); wanted \(2, 1, 20\), of one granul"),
        ("scale", lambda t: t[:1], r"scale is of shape \(1, 1, 20\); wanted \(2, 1, 20\)"),
        ("scale", lambda t: t.bfloat16(), r"scale is torch.bfloat16; wanted torch.float32"),
        ("scale", lambda t: t.to("meta"), r"scale is on meta; wanted cpu"),
        ("scale", lambda t: t.repeat(1, 1, 2)[..., ::2], r"scale is strided \(40, 40, 2\); wanted a last stride of 1"),
    ],
)
def test_mistakes_are_value_errors(name, change, message):
    op = "gated_residual_rms_norm_modulate"
    inputs = make_inputs(op, (2, 3, 20), False, torch.float32, strided=False)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        ddt_kernels.gated_residual_rms_norm_modulate(*inputs.values())


@EVERY_OP
def test_every_argument_is_checked(op):
    for name in input_names(op):
        inputs = make_inputs(op, SHAPE, False, torch.float32)
        inputs[name] = inputs[name][0]
        with pytest.raises(ValueError, match=f"{op}: {name} is of shape"):
            getattr(ddt_kernels, op)(*inputs.values())


@pytest.mark.parametrize("op", OPS[:3])
@pytest.mark.parametrize("eps", [0, -1e-6, float("nan")])
def test_eps_must_be_positive(op, eps):
    inputs = make_inputs(op, SHAPE, False, torch.float32)
    with pytest.raises(ValueError, match=f"{op}: eps is {eps}; wanted a finite number above 0"):
        getattr(ddt_kernels, op)(*inputs.values(), eps=eps)


@EVERY_OP
@GRANULARITIES
def test_cost_is_what_the_operators_read_and_write(op, per_token):
    inputs = make_inputs(op, SHAPE, per_token, torch.bfloat16)
    grads = make_grads(op, inputs)
    cost = getattr(ddt_kernels, f"{op}_cost")
    for backward, name, args in (
        (False, op, operator_args(op, inputs)),
        (True, f"{op}_backward", backward_args(op, inputs, grads)),
    ):
        tensors = [*args, *as_tuple(operator(name)(*args))]
        made = cost(*SHAPE, torch.bfloat16, per_token, backward=backward)
        assert made.bytes_moved == sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        assert 2 * 2 * 3 * 20 <= made.flops <= 30 * 2 * 3 * 20


def test_costs_add():
    a = ddt_kernels.gated_residual_cost(*SHAPE, torch.bfloat16, True)
    assert a + a == ddt_kernels.Cost(2 * a.bytes_moved, 2 * a.flops)


def test_tiles_cover_every_width():
    for channels in range(1, norm_launch.MAX_CHANNELS + 1):
        for config in (norm_launch.forward_config(channels), norm_launch.backward_config(channels)):
            assert config.main <= channels <= config.main + config.tail < 2 * channels + 16
            assert config.num_warps in (1, 2, 4, 8)
            for size in (config.main, config.tail or 1):
                assert size & (size - 1) == 0
    assert norm_launch.forward_config(1152) == norm_launch.TileConfig(1024, 128, 1)
    assert norm_launch.backward_config(1152) == norm_launch.TileConfig(1024, 128, 4)


def test_registers_are_limited_where_the_compiler_would_spill_for_occupancy():
    def limit(channels, per_token, arch):
        return norm_launch.backward_register_limit(norm_launch.backward_config(channels), per_token, arch)

    assert limit(1152, False, 90) is None
    assert limit(768, False, 90) == limit(1536, False, 90) == limit(1152, False, 100) == 255
    assert limit(768, True, 90) is limit(1152, True, 100) is None


def test_backward_programs_have_enough_rows_and_no_more():
    assert norm_launch.backward_rows_per_program(128, 256) == 32  # 32K rows: 1024 programs
    assert norm_launch.backward_rows_per_program(1, 256) == 1
    assert norm_launch.backward_rows_per_program(1000, 1024) == 32
    assert norm_launch.backward_rows_per_program(5000, 12) == 16


@pytest.mark.gpu
@EVERY_OP
@GRANULARITIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "shape", [(3, 24, 72), (2, 40, 341), (8, 256, 1152), (2, 256, 1152), (3, 1, 2047), (1, 3, 6144)]
)
def test_on_a_gpu(op, per_token, dtype, shape, monkeypatch):
    poison_empty(monkeypatch)
    inputs = make_inputs(op, shape, per_token, dtype, device="cuda")
    grads = make_grads(op, inputs)
    outputs, gradients = with_gradients(getattr(ddt_kernels, op), list(inputs.values()), grads)
    named = dict(zip(inputs, gradients, strict=True))
    if op == "gated_residual":
        assert torch.equal(named.pop("x"), grads[0])
    check_against_reference(op, inputs, grads, outputs, named)


@pytest.mark.gpu
@EVERY_OP
@GRANULARITIES
def test_cuda_graph_replays_forward_and_backward(op, per_token):
    inputs = make_inputs(op, (4, 256, 1152), per_token, torch.bfloat16, device="cuda")
    grads = make_grads(op, inputs)
    forward, backward = operator_args(op, inputs), backward_args(op, inputs, grads)

    def run():
        made = [operator(op)(*forward), operator(f"{op}_backward")(*backward)]
        return [tensor for outputs in made for tensor in as_tuple(outputs)]

    check_replays(run)


@pytest.mark.gpu
def test_launches_on_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = make_inputs("rms_norm_modulate", SHAPE, True, torch.float32, device="cuda:1")
    with torch.cuda.device(0):
        y = ddt_kernels.rms_norm_modulate(*inputs.values())
    torch.testing.assert_close(y, reference.rms_norm_modulate(*inputs.values()))
