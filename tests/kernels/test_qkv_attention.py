"""qkv_attention as a user meets it: operators, gradients, what it keeps, compilation, mistakes, costs."""

import pytest
import torch

import ddt_kernels
from ddt_kernels import reference
from kernel_testing import assert_as_accurate, check_compiles, check_replays, poison_empty, with_gradients
from qk_norm_rope_cases import DIFFERENTIABLE, make_inputs

SHAPE = (2, 5, 3, 12)
SCALE = 12**-0.5
OPERATOR, BACKWARD = torch.ops.ddt_kernels.qkv_attention.default, torch.ops.ddt_kernels.qkv_attention_backward.default
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


def make_grad(inputs):
    """A gradient of the output, not contiguous."""
    B, N, _, H, D = inputs["qkv"].shape
    grad = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    return grad.to(inputs["qkv"].dtype).to(inputs["qkv"].device)


def on(inputs, function):
    """`function` of the differentiable inputs alone, and those."""
    tables = inputs["cos"], inputs["sin"]
    return lambda *leaves: function(*leaves, *tables), [inputs[name] for name in DIFFERENTIABLE]


def two_ops(qkv, *others):
    return ddt_kernels.attention(*ddt_kernels.qk_norm_rope(qkv, *others).unbind(2))


def check_against_reference(inputs, grad, out, gradients):
    plain, leaves = on(inputs, reference.qkv_attention)
    by_torch, exact = (
        with_gradients(plain, [leaf.to(kind) for leaf in leaves], [grad.to(kind)])
        for kind in (grad.dtype, torch.float64)
    )
    for name, *results in zip(
        ("output", *DIFFERENTIABLE),
        (out, *gradients),
        (*by_torch[0], *by_torch[1]),
        (*exact[0], *exact[1]),
        strict=True,
    ):
        assert_as_accurate(name, *results)


def test_opcheck():
    inputs = make_inputs(SHAPE, torch.float32)
    leaves = [tensor.requires_grad_(name in DIFFERENTIABLE) for name, tensor in inputs.items()]
    torch.library.opcheck(OPERATOR, (*leaves, 1e-6, 0.3))
    inputs = make_inputs(SHAPE, torch.float32)
    made = OPERATOR(*inputs.values(), 1e-6, 0.3)
    torch.library.opcheck(BACKWARD, (make_grad(inputs), *made, *inputs.values(), 1e-6, 0.3))


@pytest.mark.parametrize("module", [reference, ddt_kernels], ids=["reference", "operator"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_gradcheck(module, scale):
    inputs = make_inputs((2, 3, 2, 8), torch.float64)
    function, leaves = on(inputs, lambda *arguments: module.qkv_attention(*arguments, scale=scale))
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@DTYPES
@pytest.mark.parametrize("strided", [True, False], ids=["strided", "contiguous"])
def test_on_a_cpu_it_is_the_two_ops_bit_for_bit(dtype, strided):
    inputs = make_inputs(SHAPE, dtype, strided=strided)
    grad, before = make_grad(inputs), inputs["qkv"].clone()
    function, leaves = on(inputs, ddt_kernels.qkv_attention)
    made = with_gradients(function, leaves, [grad])
    expected = with_gradients(on(inputs, two_ops)[0], leaves, [grad])
    for a, b in zip(made, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert made[0][0].is_contiguous()
    assert torch.equal(inputs["qkv"], before)
    check_against_reference(inputs, grad, made[0][0], made[1])


def test_three_tensors_are_kept_instead_of_six():
    inputs = make_inputs(SHAPE, torch.float32, strided=False)
    heads = inputs["qkv"][:, :, 0].numel()

    def kept(function):
        # As in a layer: qkv is a GEMM's output, which is alive for as long as something keeps it.
        run, leaves = on(inputs, function)
        qkv, *weights = (leaf.detach().requires_grad_() for leaf in leaves)
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run(qkv * 1, *weights)
        assert out.requires_grad
        return sum(size for size in storages.values() if size >= heads) / heads

    assert kept(ddt_kernels.qkv_attention) == 3 + 1
    assert kept(two_ops) == 6 + 1


def test_compiles_without_graph_breaks():
    inputs = make_inputs(SHAPE, torch.float32)
    function, leaves = on(inputs, ddt_kernels.qkv_attention)
    operator, _ = on(inputs, lambda *arguments: OPERATOR(*arguments, 1e-6, SCALE)[0])
    check_compiles(function, operator, leaves, [make_grad(inputs)])


def test_the_logsumexp_is_not_differentiable():
    inputs = make_inputs(SHAPE, torch.float32)
    inputs["qkv"].requires_grad_()
    out, lse = OPERATOR(*inputs.values(), 1e-6, 0.3)
    assert out.requires_grad
    assert not lse.requires_grad


def test_second_derivatives_are_refused():
    inputs = make_inputs(SHAPE, torch.float32)
    qkv = inputs["qkv"].requires_grad_()
    out = ddt_kernels.qkv_attention(*inputs.values())
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), qkv)


MISTAKES = [
    ("qkv", lambda t: t[:, :, :2], r"qkv is of shape \(2, 5, 2, 3, 12\); wanted shape \(B, N, 3, H, D\)"),
    (
        "qkv",
        lambda t: t.new_zeros(1, 5, 3, 2, 132),
        r"qkv is of shape \(1, 5, 3, 2, 132\); wanted .* D a multiple of 4 in 4..128",
    ),
    ("qkv", lambda t: t.int(), r"qkv is torch.int32 on cpu; wanted bfloat16, float16 or float32"),
    ("qkv", lambda t: t.mT.contiguous().mT, r"qkv is strided .*; wanted its last three dimensions contiguous"),
    ("q_weight", lambda t: t[:8], r"q_weight is of shape \(8,\); wanted \(12,\)"),
    ("k_weight", lambda t: t.half(), r"k_weight is torch.float16; wanted torch.float32"),
    ("cos", lambda t: t[:2], r"cos is of shape \(2, 6\); wanted \(5, 6\), one angle per token and pair"),
    ("sin", lambda t: t.clone().requires_grad_(), r"sin is to be differentiated; wanted a table without gradient"),
    ("eps", lambda _: 0.0, r"eps is 0.0; wanted a finite number above 0"),
    ("scale", lambda _: -1.0, r"scale is -1.0; wanted a finite number above 0"),
    ("scale", lambda _: float("nan"), r"scale is nan; wanted a finite number above 0"),
]


@pytest.mark.parametrize(("name", "change", "message"), MISTAKES)
def test_mistakes_are_value_errors(name, change, message):
    arguments = make_inputs(SHAPE, torch.float32, strided=False) | {"eps": 1e-6, "scale": 0.3}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"qkv_attention: {message}"):
        ddt_kernels.qkv_attention(**arguments)


def test_cost_is_what_the_operators_read_and_write():
    inputs = make_inputs(SHAPE, torch.bfloat16, strided=False)
    made, grad = OPERATOR(*inputs.values(), 1e-6, SCALE), make_grad(inputs)
    gradients = BACKWARD(grad, *made, *inputs.values(), 1e-6, SCALE)

    def size(*tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    forward, backward = (ddt_kernels.qkv_attention_cost(*SHAPE, torch.bfloat16, backward=b) for b in (False, True))
    assert forward.bytes_moved == size(*inputs.values(), *made)
    assert backward.bytes_moved == size(grad, *made, *inputs.values(), *gradients)
    attention, norm = (
        getattr(ddt_kernels, f"{name}_cost")(*SHAPE, torch.bfloat16).flops for name in ("attention", "qk_norm_rope")
    )
    assert forward.flops == attention + norm
    assert 2.5 * attention + 3 * norm <= backward.flops <= 2.5 * attention + 4 * norm


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    "shape", [(3, 24, 3, 72), (8, 256, 16, 72), (2, 40, 5, 20), (3, 1, 12, 64), (2, 130, 2, 128), (1, 1000, 2, 80)]
)
def test_on_a_gpu(dtype, shape, monkeypatch):
    poison_empty(monkeypatch)
    inputs = make_inputs(shape, dtype, device="cuda")
    grad = make_grad(inputs)
    function, leaves = on(inputs, ddt_kernels.qkv_attention)
    (out,), gradients = with_gradients(function, leaves, [grad])
    check_against_reference(inputs, grad, out, gradients)


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward():
    inputs = make_inputs((4, 256, 16, 72), torch.bfloat16, device="cuda")
    grad = make_grad(inputs)

    def run():
        made = OPERATOR(*inputs.values(), 1e-6, 0.1)
        return [*made, *BACKWARD(grad, *made, *inputs.values(), 1e-6, 0.1)]

    check_replays(run)
