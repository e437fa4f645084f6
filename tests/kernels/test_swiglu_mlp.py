"""swiglu_mlp as a user meets it: operator, gradients, what it keeps, compilation, mistakes, costs."""

import pytest
import torch

import ddt_kernels
from ddt_kernels import reference
from kernel_testing import check_compiles, poison_empty, with_gradients
from swiglu_cases import LAYOUTS, check_against_reference, make_grad, make_inputs, make_mlp_inputs

SHAPE = (2, 3, 20, 12)
OPERATOR, BACKWARD = torch.ops.ddt_kernels.swiglu_mlp.default, torch.ops.ddt_kernels.swiglu_mlp_backward.default
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


def leaves(shape=SHAPE, dtype=torch.float32, **options):
    return [tensor.detach().requires_grad_() for tensor in make_mlp_inputs(shape, dtype, **options).values()]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, keep):
    torch.library.opcheck(OPERATOR, (*leaves(layout=layout, out=16), keep))


def test_opcheck_backward():
    inputs = make_mlp_inputs(SHAPE, torch.float32, out=16)
    gate_up = OPERATOR(*inputs.values(), True)[1]
    torch.library.opcheck(BACKWARD, (make_grad(inputs), *inputs.values(), gate_up))


@pytest.mark.parametrize("function", [reference.swiglu_mlp, ddt_kernels.swiglu_mlp], ids=["reference", "operator"])
def test_gradcheck(function):
    assert torch.autograd.gradcheck(function, leaves(dtype=torch.float64, out=16))


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_cpu_the_reference_runs(dtype, layout):
    inputs = make_mlp_inputs((2, 5, 72, 170), dtype, layout=layout, out=40)
    grad = make_grad(inputs)
    (z,), gradients = with_gradients(ddt_kernels.swiglu_mlp, list(inputs.values()), [grad])
    assert torch.equal(z, reference.swiglu_mlp(*inputs.values()))
    assert torch.equal(z, ddt_kernels.swiglu_mlp(*inputs.values()))
    assert z.is_contiguous()
    check_against_reference(inputs, grad, z, dict(zip(inputs, gradients, strict=True)))


def test_compiles_without_graph_breaks():
    inputs = make_mlp_inputs(SHAPE, torch.float32)
    grad = make_grad(inputs)
    check_compiles(ddt_kernels.swiglu_mlp, lambda *i: OPERATOR(*i, True)[0], list(inputs.values()), [grad])


def kept_columns(function, inputs):
    """Elements kept for the backward pass besides the arguments themselves, per token."""
    arguments = {tensor.data_ptr() for tensor in inputs}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in arguments:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)
    assert output.requires_grad
    return sum(kept.values()) / inputs[0][..., 0].numel()


def test_two_columns_of_f_are_kept_instead_of_three_or_four():
    inputs = leaves()
    width = SHAPE[3]
    linear = torch.nn.functional.linear
    assert kept_columns(ddt_kernels.swiglu_mlp, inputs) == 2 * width
    assert kept_columns(lambda x, w1, w3, w2: linear(ddt_kernels.swiglu(x, w1, w3), w2), inputs) == 3 * width
    assert kept_columns(reference.swiglu_mlp, inputs) == 4 * width


def test_what_was_not_kept_is_recomputed():
    inputs = leaves()
    kept, recomputed = (torch.autograd.grad(OPERATOR(*inputs, keep)[0].sum(), inputs) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0, 0], r"x is of shape \(20,\); wanted shape \(\.\.\., C\)"),
        ("w2", lambda t: t[:, :11], r"w2 is of shape \(20, 11\); wanted shape \(O, 12\), as w1 has rows"),
        ("w2", lambda t: t[:0], r"w2 is of shape \(0, 12\); wanted shape \(O, 12\)"),
        ("w2", lambda t: t[0], r"w2 is of shape \(12,\); wanted shape \(O, 12\)"),
        ("w2", lambda t: t.half(), r"w2 is torch.float16; wanted torch.float32"),
        ("w2", lambda t: t.to("meta"), r"w2 is on meta; wanted cpu"),
        ("w2", lambda t: t.T.contiguous().T, r"w2 is strided \(1, 20\); wanted a last stride of 1"),
        ("w2", lambda t: t.tolist(), r"w2 is a list; wanted a torch.Tensor"),
    ],
)
def test_mistakes_are_value_errors(name, change, message):
    inputs = make_mlp_inputs(SHAPE, torch.float32)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=f"swiglu_mlp: {message}"):
        ddt_kernels.swiglu_mlp(*inputs.values())


@pytest.mark.parametrize("training", [False, True])
def test_cost_is_what_the_operators_read_and_write(training):
    inputs = make_mlp_inputs(SHAPE, torch.bfloat16)
    tensors = [*inputs.values(), *OPERATOR(*inputs.values(), training)]
    cost = ddt_kernels.swiglu_mlp_cost(*SHAPE, torch.bfloat16, training)
    B, N, C, F = SHAPE
    assert cost.bytes_moved == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert 0 < cost.flops - 3 * 2 * B * N * C * F <= 10 * B * N * F


def test_cost_of_the_backward_pass():
    inputs = make_mlp_inputs(SHAPE, torch.bfloat16)
    gate_up = OPERATOR(*inputs.values(), True)[1]
    args = (make_grad(inputs), *inputs.values(), gate_up)
    cost = ddt_kernels.swiglu_mlp_cost(*SHAPE, torch.bfloat16, backward=True)
    B, N, C, F = SHAPE
    assert cost.bytes_moved == sum(tensor.numel() * tensor.element_size() for tensor in (*args, *BACKWARD(*args)))
    assert 0 < cost.flops - 6 * 2 * B * N * C * F <= 20 * B * N * F


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("function", "make"), [(ddt_kernels.swiglu, make_inputs), (ddt_kernels.swiglu_mlp, make_mlp_inputs)]
)
def test_autocast_changes_nothing(function, make, device):
    inputs = make(SHAPE, torch.float32, device=device)
    grad = make_grad(inputs)
    tensors = list(inputs.values())
    expected = with_gradients(function, tensors, [grad])
    with torch.autocast(device, torch.bfloat16):
        found = with_gradients(function, tensors, [grad])
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 24, 72, 170), (2, 40, 341, 909), (8, 256, 1152, 3072)])
def test_on_a_gpu(dtype, layout, shape, monkeypatch):
    poison_empty(monkeypatch)
    inputs = make_mlp_inputs(shape, dtype, device="cuda", layout=layout)
    grad = make_grad(inputs)
    (z,), gradients = with_gradients(ddt_kernels.swiglu_mlp, list(inputs.values()), [grad])
    check_against_reference(inputs, grad, z, dict(zip(inputs, gradients, strict=True)))
    with torch.no_grad():
        assert torch.equal(ddt_kernels.swiglu_mlp(*inputs.values()), z)
