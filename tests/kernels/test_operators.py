"""Properties of every differentiable operator: results, gradients, compilation, refusals, costs, CUDA graphs."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ddt_kernels
from ddt_kernels import reference
from kernel_testing import (
    BF16,
    DTYPES,
    FP32,
    FP64,
    as_list,
    assert_all_equal,
    check_compiles,
    check_replays,
    poison_empty,
    total_bytes,
    with_gradients,
)
from operators import ATTENTION, NAMED, OPERATORS, QK_NORM_ROPE, QKV_ATTENTION, SWIGLU, SWIGLU_MLP, cost

EVERY_OPERATOR = pytest.mark.parametrize("op", OPERATORS, ids=str)
EVERY_NAME = pytest.mark.parametrize("op", NAMED, ids=lambda op: op.name)
EVERY_LAYOUT = pytest.mark.parametrize(
    ("op", "layout"), [pytest.param(op, layout, id=f"{op}-{layout}") for op in OPERATORS for layout in op.layouts]
)


@EVERY_LAYOUT
def test_opcheck(op, layout):
    inputs = op.inputs(layout=layout)
    for constants in op.constants:
        leaves = [t.detach().requires_grad_(name not in op.fixed) for name, t in inputs.items()]
        torch.library.opcheck(op.registered, (*leaves, *constants))
    if layout == op.layouts[0]:
        torch.library.opcheck(op.backward, tuple(op.backward_arguments(inputs)))


@pytest.mark.parametrize("op", [ATTENTION, QKV_ATTENTION], ids=str)
def test_opcheck_where_an_output_has_a_dtype_of_its_own(op):
    inputs = op.inputs(BF16)
    torch.library.opcheck(op.registered, (*inputs.values(), *op.constants[0]))
    torch.library.opcheck(op.backward, tuple(op.backward_arguments(inputs)))


@EVERY_OPERATOR
@pytest.mark.parametrize("module", [reference, ddt_kernels], ids=["reference", "operator"])
def test_gradcheck(op, module):
    inputs = {name: t.contiguous() for name, t in op.inputs(FP64, shape=op.tiny).items()}
    for options in op.public_options:
        function = op.of_leaves(getattr(module, op.name), inputs)
        assert torch.autograd.gradcheck(lambda *i, f=function, o=options: f(*i, **o), op.leaves(inputs))


@EVERY_LAYOUT
@DTYPES
def test_on_a_cpu(op, layout, dtype):
    """The reference's result, gradients within the tolerance rule, contiguous outputs, untouched inputs."""
    inputs = op.inputs(dtype, layout)
    grads, before = op.make_grads(inputs), [t.clone() for t in inputs.values()]
    outputs, gradients = with_gradients(op.of_leaves(op.public, inputs), op.leaves(inputs), grads)
    assert all(output.is_contiguous() for output in outputs)
    if op.as_reference:
        assert_all_equal(outputs, as_list(getattr(reference, op.name)(*inputs.values())))
    op.check(inputs, outputs, grads, gradients)
    assert_all_equal(as_list(op.public(*inputs.values())), outputs)
    assert_all_equal(list(inputs.values()), before)


@EVERY_OPERATOR
def test_compiles_without_graph_breaks(op):
    inputs = op.inputs()

    def registered(*leaves):
        made = op.registered(*leaves, *(inputs[name] for name in op.fixed), *op.constants[0])
        return made if isinstance(made, torch.Tensor) else tuple(made[: op.outputs])

    tensors = [t for name, t in inputs.items() if name not in op.fixed]
    grads = op.make_grads(inputs)
    check_compiles(op.of_leaves(op.public, inputs), registered, tensors, grads)


@EVERY_NAME
def test_exports(op):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return op.public(*inputs)

    graph = torch.export.export(Module(), tuple(op.inputs().values())).graph
    (node,) = [node for node in graph.nodes if node.target == op.registered]
    if op in (SWIGLU, SWIGLU_MLP):
        assert node.args[-1] is False  # keeps nothing for a backward pass


@EVERY_NAME
def test_second_derivatives_are_refused(op):
    inputs = op.inputs()
    leaves = op.leaves(inputs)
    outputs = as_list(op.of_leaves(op.public, inputs)(*leaves))
    (grad,) = torch.autograd.grad(outputs[-1].square().sum(), leaves[-1:], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), leaves)


@EVERY_NAME
def test_the_gradient_of_a_sum_has_no_strides_to_rely_on(op):
    inputs = op.inputs()
    leaves, function = op.leaves(inputs), op.of_leaves(op.public, inputs)
    made = torch.autograd.grad(sum(output.sum() for output in as_list(function(*leaves))), leaves)
    ones = [torch.ones_like(grad) for grad in op.make_grads(inputs)]
    torch.testing.assert_close(list(made), with_gradients(function, leaves, ones)[1])


@pytest.mark.parametrize("op", [ATTENTION, QKV_ATTENTION, SWIGLU, SWIGLU_MLP], ids=str)
def test_what_is_kept_for_the_backward_pass_is_not_differentiable(op):
    inputs = op.inputs()
    out, kept = op.registered(*op.leaves(inputs), *(inputs[name] for name in op.fixed), *op.constants[0])
    assert out.requires_grad
    assert not kept.requires_grad


@EVERY_NAME
def test_forward_mode_is_refused(op):
    inputs = op.inputs()
    function = op.of_leaves(op.public, inputs)
    tensors = [t.detach() for t in op.leaves(inputs)]
    for i, tensor in enumerate(tensors):
        rest = lambda dual, i=i: function(*tensors[:i], dual, *tensors[i + 1 :])  # noqa: E731
        with pytest.raises(ValueError, match="is a dual tensor of forward-mode differentiation; expected reverse mode"):
            torch.func.jvp(rest, (tensor,), (torch.ones_like(tensor),))
    with torch.autograd.forward_ad.dual_level():
        assert all(output.isfinite().all() for output in as_list(function(*tensors)))


@EVERY_NAME
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(op, use_reentrant):
    inputs = op.inputs()
    leaves, grads = op.leaves(inputs), op.make_grads(inputs)
    function = op.of_leaves(op.public, inputs)
    expected = with_gradients(function, leaves, grads)[1]
    torch.autograd.backward(as_list(checkpoint(function, *leaves, use_reentrant=use_reentrant)), grads)
    assert_all_equal([leaf.grad for leaf in leaves], expected)


@EVERY_NAME
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_changes_nothing(op, device):
    inputs = op.inputs(device=device)
    arguments = op.of_leaves(op.public, inputs), op.leaves(inputs), op.make_grads(inputs)
    expected = with_gradients(*arguments)
    with torch.autocast(device, torch.bfloat16):
        found = with_gradients(*arguments)
    for a, b in zip(found, expected, strict=True):
        assert_all_equal(a, b)


@EVERY_OPERATOR
def test_cost_is_what_the_operators_read_and_write(op):
    inputs = op.inputs(BF16, "contiguous")
    for constants in op.constants:
        made = cost(op, constants)
        assert made.bytes_moved == total_bytes([*inputs.values(), *op.forward_results(inputs, constants)])
        low, high = op.flops(op.shape, False)
        assert low <= made.flops <= high
    made, arguments = cost(op, backward=True), op.backward_arguments(inputs)
    unread = total_bytes([inputs["qkv"]]) // 3 if op.name == "qk_norm_rope" else 0  # v
    assert made.bytes_moved == total_bytes([*arguments, *as_list(op.backward(*arguments))]) - unread
    low, high = op.flops(op.shape, True)
    assert low <= made.flops <= high


def test_costs_add():
    a = ddt_kernels.gated_residual_cost(2, 3, 20, BF16, True)
    assert a + a == ddt_kernels.Cost(2 * a.bytes_moved, 2 * a.flops)


def arguments_of(ops):
    return [pytest.param(op, name, id=f"{op.name}-{name}") for op in ops for name in op.inputs()]


@pytest.mark.parametrize(("op", "name"), arguments_of(NAMED))
def test_every_argument_is_checked(op, name):
    """Refused: anything but a tensor; another dtype, device or column stride; one dimension less."""
    inputs = op.inputs(FP32, "contiguous")
    tensor, first = inputs[name], next(iter(inputs))
    others = (None, 1.0, [1.0], np.ones(3))
    cases = [(other, f"is a {type(other).__name__}; expected a torch.Tensor$") for other in others]
    strided = tensor.repeat_interleave(2, -1)[..., ::2]
    cases += [(strided, r"has strides \(.*\); expected (a last stride of 1|a contiguous tensor|its last three dim)")]
    if name == first:
        kinds = r"expected bfloat16, float16 or float32 \(float64 on a CPU only\)"
        cases += [(tensor.int(), f"is torch.int32 on cpu; {kinds}")]
        cases += [(tensor.double().to("meta"), f"is torch.float64 on meta; {kinds}")]
    else:
        cases += [
            (tensor.half(), "is torch.float16; expected torch.float32"),
            (tensor.to("meta"), "is on meta; expected cpu"),
        ]
    if not (op.name.startswith("swiglu") and name == "x"):  # which takes any number of dimensions
        cases += [(tensor[0], r"has shape \(.*\); expected ")]
    for function in (op.name, "qk_norm_rope_") if op == QK_NORM_ROPE else (op.name,):
        for wrong, message in cases:
            with pytest.raises(ValueError, match=f"^{function}: {name} {message}"):
                getattr(ddt_kernels, function)(*(inputs | {name: wrong}).values())


@pytest.mark.parametrize("op", [op for op in NAMED if "swiglu" not in op.name], ids=lambda op: op.name)
@pytest.mark.parametrize("value", ["a", None, 0, -1e-6, float("nan"), float("inf")])
def test_eps_and_scale_are_finite_and_positive(op, value):
    inputs = op.inputs()
    names = {"gated_residual": (), "attention": ("scale",), "qkv_attention": ("eps", "scale")}.get(op.name, ("eps",))
    for name in names if value is not None else {*names} - {"scale"}:  # whose default is None
        with pytest.raises(ValueError, match=f"^{op.name}: {name} is {value!r}; expected a finite number above 0$"):
            op.public(*inputs.values(), **{name: value})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "shape", "layout"),
    [
        pytest.param(op, shape, layout, id=f"{op}-{shape}-{layout}")
        for op in OPERATORS
        for shape in op.gpu_shapes
        for layout in op.layouts
    ],
)
@DTYPES
def test_on_a_gpu(op, shape, layout, dtype, monkeypatch):
    poison_empty(monkeypatch)
    inputs = op.inputs(dtype, layout, shape, "cuda")
    grads = op.make_grads(inputs)
    outputs, gradients = with_gradients(op.of_leaves(op.public, inputs), op.leaves(inputs), grads)
    op.check(inputs, outputs, grads, gradients)
    with torch.no_grad():
        assert_all_equal(as_list(op.public(*inputs.values())), outputs)


@pytest.mark.gpu
@EVERY_OPERATOR
def test_cuda_graph_replays_forward_and_backward(op):
    inputs = op.inputs(BF16, shape=op.graph_shape, device="cuda")
    arguments = op.backward_arguments(inputs)

    def run():
        made = [t for constants in op.constants for t in op.forward_results(inputs, constants) if t.numel()]
        return [*made, *(t for t in as_list(op.backward(*arguments)) if t.numel())]

    check_replays(run)
