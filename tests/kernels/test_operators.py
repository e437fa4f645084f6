"""Properties of every differentiable operator: results, gradients, compilation, refusals, costs, CUDA graphs."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ddt_kernels
from kernel_testing import (
    BF16,
    DTYPES,
    FP32,
    FP64,
    as_list,
    assert_all_equal,
    check_replays,
    compiled_results,
    poison_empty,
    total_bytes,
    with_gradients,
)
from operators import ATTENTION, BIASED_MLP, NAMED, OPERATORS, QK_NORM_ROPE, QKV_ATTENTION, SWIGLU, SWIGLU_MLP, cost

EVERY_OPERATOR = pytest.mark.parametrize("op", OPERATORS, ids=str)
EVERY_NAME = pytest.mark.parametrize("op", NAMED, ids=lambda op: op.name)
EVERY_LAYOUT = pytest.mark.parametrize(
    ("op", "layout"), [pytest.param(op, layout, id=f"{op}-{layout}") for op in OPERATORS for layout in op.layouts]
)


@pytest.mark.slow
@EVERY_LAYOUT
def test_opcheck(op, layout):
    inputs = op.inputs(layout=layout)
    for constants in op.constants:
        leaves = {name: t.detach().requires_grad_(name not in op.fixed) for name, t in inputs.items()}
        torch.library.opcheck(op.registered, tuple(op.arguments(leaves, constants)))
    if layout == op.layouts[0]:
        torch.library.opcheck(op.backward, tuple(op.backward_arguments(inputs)))
    elif op in (ATTENTION, QKV_ATTENTION):  # one of whose outputs has a dtype of its own
        narrow = op.inputs(BF16)
        torch.library.opcheck(op.registered, tuple(op.arguments(narrow)))
        torch.library.opcheck(op.backward, tuple(op.backward_arguments(narrow)))


@pytest.mark.slow
@EVERY_OPERATOR
@pytest.mark.parametrize("implementation", ["reference", "public"])
def test_gradcheck(op, implementation):
    inputs = {name: t.contiguous() for name, t in op.inputs(FP64, shape=op.tiny).items()}
    for options in op.public_options:
        function = op.of_leaves(getattr(op, implementation), inputs)
        assert torch.autograd.gradcheck(lambda *i, f=function, o=options: f(*i, **o), op.leaves(inputs))


@EVERY_LAYOUT
@DTYPES
def test_on_a_cpu(op, layout, dtype):
    """The reference's result, gradients within the tolerance rule, contiguous outputs, untouched inputs."""
    inputs = op.inputs(dtype, layout)
    before = [t.clone() for t in inputs.values()]
    outputs = op.checked(inputs)
    assert all(output.is_contiguous() for output in outputs)
    if op.as_reference:
        assert_all_equal(outputs, as_list(op.reference(*inputs.values())))
    assert_all_equal(as_list(op.public(*inputs.values())), outputs)
    assert_all_equal(list(inputs.values()), before)


@pytest.mark.slow
@EVERY_OPERATOR
def test_compiles_without_graph_breaks(op):
    """Compiled for a CPU, the public function is plain PyTorch, whose gradients round in another order; the operator
    stays itself, bit for bit."""
    inputs = op.inputs()
    tensors, grads = [t for name, t in inputs.items() if name not in op.fixed], op.make_grads(inputs)
    function = op.of_leaves(op.public, inputs)

    def registered(*leaves):
        named = dict(zip(inputs, (*leaves, *(inputs[name] for name in op.fixed)), strict=True))
        made = [t for t in op.forward_results(named) if t.numel()]  # an empty one stands for what the call has not
        return tuple(made[: op.outputs])

    outputs, gradients = with_gradients(function, tensors, grads)
    for compiled, opaque in ((function, False), (registered, True)):
        made, made_gradients, operators = compiled_results(compiled, tensors, grads)
        assert bool(operators) == opaque, operators
        assert_all_equal(made, outputs)
        torch.testing.assert_close(made_gradients, gradients, **({"rtol": 0, "atol": 0} if opaque else {}))
    made, _, operators = compiled_results(function, tensors)
    assert not operators
    assert_all_equal(made, outputs)


@pytest.mark.slow
@EVERY_NAME
def test_exports(op):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return op.public(*inputs)

    graph = torch.export.export(Module(), tuple(op.inputs().values())).graph
    (node,) = [node for node in graph.nodes if node.target == op.registered]
    if op.name.startswith("swiglu"):
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


def public_names(op):
    return (op.name, "qk_norm_rope_") if op == QK_NORM_ROPE else (op.function_name,)


@pytest.mark.parametrize(
    ("op", "name"), [pytest.param(op, name, id=f"{op.name}-{name}") for op in NAMED for name in op.inputs()]
)
def test_every_argument_is_checked(op, name):
    """Refused: anything but a tensor; another dtype, device or column stride; one dimension less."""
    inputs = op.inputs(FP32, "contiguous")
    tensor, first = inputs[name], next(iter(inputs))
    others = ((None, "None"), (1, "an int"), (1.0, "a float"), ([1.0], "a list"), (np.ones(3), "a ndarray"))
    cases = [(other, f"is {kind}; expected a torch.Tensor") for other, kind in others]
    strided = tensor.repeat_interleave(2, -1)[..., ::2]
    cases += [(strided, r"has strides \(.*\); expected (a last stride of 1|a contiguous tensor|its last three dim)")]
    if name == first:
        kinds = r"expected bfloat16, float16 or float32 \(float64 on a CPU only\)"
        cases += [(tensor.int(), f"is torch.int32 on cpu; {kinds}")]
        cases += [(tensor.double().to("meta"), f"is torch.float64 on meta; {kinds}")]
    else:
        cases += [(tensor.half(), "is torch.float16; expected torch.float32")]
        cases += [(tensor.to("meta"), "is on meta; expected cpu")]
    if not (op.name.startswith("swiglu") and name == "x"):  # which takes any number of dimensions
        cases += [(tensor[0], r"has shape \(.*\); expected ")]
    for function in public_names(op):
        for wrong, message in cases:
            with pytest.raises(ValueError, match=f"^{function}: {name} {message}"):
                getattr(ddt_kernels, function)(*(inputs | {name: wrong}).values())


@pytest.mark.parametrize("op", [op for op in NAMED if "swiglu" not in op.name], ids=lambda op: op.name)
@pytest.mark.parametrize("value", ["a", None, 0, -1e-6, float("nan"), float("inf"), True])
def test_eps_and_scale_are_finite_and_positive(op, value):
    inputs = op.inputs()
    names = {"gated_residual": (), "attention": ("scale",), "qkv_attention": ("eps", "scale")}.get(op.name, ("eps",))
    message = f"is {value!r}; expected a finite number above 0$"
    for name in names if value is not None else {*names} - {"scale"}:  # whose default is None
        with pytest.raises(ValueError, match=f"^{op.function_name}: {name} {message}"):
            op.public(*inputs.values(), **{name: value})


NORM = next(op for op in OPERATORS if str(op) == "gated_residual_rms_norm_modulate-sample")
QK, QKV, MLP = QK_NORM_ROPE, QKV_ATTENTION, BIASED_MLP
MISTAKES = [
    (NORM, "x", lambda t: t[:, :0], r"x has shape \(2, 0, 20\); expected B and N at least 1, C in 1..6144"),
    (NORM, "x", lambda t: t.new_zeros(1, 1, 6145), r"x has shape .* C in 1..6144"),
    (NORM, "branch", lambda t: t[:, :2], r"branch has shape \(2, 2, 20\); expected \(2, 3, 20\)"),
    (NORM, "weight", lambda t: t[:19], r"weight has shape \(19,\); expected \(20,\)"),
    (NORM, "gate", lambda t: t[:, 0], r"gate has shape .*; expected \(2, 1, 20\) \(per sample\) or \(2, 3, 20\)"),
    (NORM, "gate", lambda t: t[:1], r"gate has shape \(1, 1, 20\); expected \(2, 1, 20\) \(per sample\) or"),
    (NORM, "shift", lambda t: t.expand(2, 3, 20), r"shift has shape \(2, 3, 20\); expected \(2, 1, 20\), like gate$"),
    (NORM, "weight", lambda t: t.half(), r"weight is torch.float16; expected torch.float32$"),
    (NORM, "scale", lambda t: t[:1], r"scale has shape \(1, 1, 20\); expected \(2, 1, 20\)"),
    (QK, "qkv", lambda t: t[:, :, :2], r"qkv has shape \(2, 3, 2, 2, 12\); expected shape \(B, N, 3, H, D\)"),
    (QK, "qkv", lambda t: t[:, :0], r"qkv has shape \(2, 0, 3, 2, 12\); expected B, N and H at least 1"),
    (QK, "qkv", lambda t: t[..., :10], r"qkv has shape \(2, 3, 3, 2, 10\); .* D a multiple of 4 in 4..256"),
    (QK, "qkv", lambda t: t.new_zeros(1, 1, 3, 1, 260), r"qkv has shape .* D a multiple of 4 in 4..256"),
    (QK, "qkv", lambda t: t.mT.contiguous().mT, r"qkv has strides \(216, 72, 24, 1, 2\); expected its last three"),
    (QK, "qkv", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), r"qkv has .* strides \(24, 12, 1\)"),
    (QK, "q_weight", lambda t: t[:8], r"q_weight has shape \(8,\); expected \(12,\)"),
    (QK, "cos", lambda t: t[:2], r"cos has shape \(2, 6\); expected \(3, 6\), one angle per token and pair"),
    (QK, "sin", lambda t: t.repeat(1, 2), r"sin has shape \(3, 12\); expected \(3, 6\)"),
    (QK, "sin", lambda t: t.clone().requires_grad_(), r"sin requires a gradient; expected a table without one"),
    (ATTENTION, "q", lambda t: t[:, :0], r"q has shape \(2, 0, 3, 12\); expected B, N and H at least 1, D a multiple"),
    (ATTENTION, "q", lambda t: t[..., :10], r"q has shape \(2, 5, 3, 10\); expected .* D a multiple of 4 in 4..128"),
    (ATTENTION, "q", lambda t: t.new_zeros(2, 5, 3, 132), r"q has shape \(2, 5, 3, 132\); expected .* in 4..128"),
    (
        ATTENTION,
        "k",
        lambda t: t[:, :0],
        r"k has shape \(2, 0, 3, 12\); expected shape \(2, Nk, 3, 12\), Nk at least 1",
    ),
    (ATTENTION, "k", lambda t: t[:, :, :2], r"k has shape \(2, 5, 2, 12\); expected shape \(2, Nk, 3, 12\), Nk at"),
    (ATTENTION, "v", lambda t: t[:, :4], r"v has shape \(2, 4, 3, 12\); expected \(2, 5, 3, 12\), like k"),
    (QKV, "qkv", lambda t: t.new_zeros(1, 5, 3, 2, 132), r"qkv has shape \(1, 5, 3, 2, 132\); .* D a .* in 4..128"),
    (QKV, "sin", lambda t: t.clone().requires_grad_(), r"sin requires a gradient; expected a table without one"),
    (SWIGLU, "x", lambda t: t[0, 0], r"x has shape \(20,\); expected shape \(\.\.\., C\)"),
    (SWIGLU, "x", lambda t: t[:, :0], r"x has shape \(2, 0, 20\); expected shape \(\.\.\., C\)"),
    (SWIGLU, "w1", lambda t: t[:, :19], r"w1 has shape \(12, 19\); expected shape \(F, 20\), columns like x"),
    (SWIGLU, "w1", lambda t: t[:0], r"w1 has shape \(0, 20\); expected shape \(F, 20\)"),
    (SWIGLU, "w3", lambda t: t[:11], r"w3 has shape \(11, 20\); expected \(12, 20\), like w1"),
    (MLP, "w2", lambda t: t[:, :11], r"w2 has shape \(20, 11\); expected shape \(O, 12\), one column per row of w1"),
    (MLP, "w2", lambda t: t[:0], r"w2 has shape \(0, 12\); expected shape \(O, 12\)"),
    (MLP, "b1", lambda t: t[:11], r"b1 has shape \(11,\); expected \(12,\)"),
    (MLP, "b2", lambda t: t[:12], r"b2 has shape \(12,\); expected \(20,\)"),
    (MLP, "b3", lambda t: None, r"b3 is None; expected a torch.Tensor: b1, b3 and b2 go together, all or none$"),
    (MLP, "b1", lambda t: None, r"b1 is None; expected a torch.Tensor: b1, b3 and b2 go together, all or none$"),
]


@pytest.mark.parametrize(("op", "name", "change", "message"), MISTAKES)
def test_mistakes_are_value_errors(op, name, change, message):
    inputs = op.inputs(layout="contiguous")
    inputs[name] = change(inputs[name])
    for function in public_names(op):
        with pytest.raises(ValueError, match=f"^{function}: {message}"):
            getattr(ddt_kernels, function)(*inputs.values())


def test_a_tensor_for_a_number_is_refused_in_one_line():
    q = torch.ones(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"^attention: scale is a Tensor; expected a finite number above 0$"):
        ddt_kernels.attention(q, q, q, torch.zeros(2, 2))


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_keep_is_a_flag(value):
    x, shift = torch.ones(2, 3, 4), torch.ones(2, 1, 4)
    message = f"^gated_residual_layer_norm_modulate: keep is {value!r}; expected True or False$"
    with pytest.raises(ValueError, match=message):
        ddt_kernels.gated_residual_layer_norm_modulate(x, x, shift, shift, shift, keep=value)


def test_attention_exports_for_any_number_of_samples_and_tokens():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ddt_kernels.attention(q, k, v)

    def heads(batch, tokens):
        return torch.randn(batch, tokens, 2, 8)

    batch, tokens, keys = (torch.export.Dim(name, min=2) for name in ("batch", "tokens", "keys"))
    shapes = {0: batch, 1: tokens}, {0: batch, 1: keys}, {0: batch, 1: keys}
    exported = torch.export.export(Module(), (heads(3, 5), heads(3, 7), heads(3, 7)), dynamic_shapes=shapes)
    inputs = heads(9, 2), heads(9, 4), heads(9, 4)
    torch.testing.assert_close(exported.module()(*inputs), ddt_kernels.attention(*inputs))


def test_strides_past_32_bits_are_refused():
    far = torch.empty(1, device="meta").as_strided((1, 2, 2, 8), (2**33, 2**31 // 128, 8, 1))
    with pytest.raises(ValueError, match=r"attention: q has strides .*call \.contiguous\(\)"):
        ddt_kernels.attention(far, far, far)


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
    outputs = op.checked(inputs)
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
