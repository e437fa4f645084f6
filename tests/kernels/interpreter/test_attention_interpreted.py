"""The attention kernels, forward and backward, against the reference; qkv_attention's launchers against two ops'."""

import pytest
import torch

from attention_cases import LAYOUTS, check_attention, check_logsumexp, make_grad, make_heads
from ddt_kernels import attention_launch, qk_norm_rope_launch, reference
from ddt_kernels.qkv_attention import launch_backward, launch_forward
from kernel_testing import BF16, FP16, FP32, assert_all_equal, check_against_reference, poison_empty
from qk_norm_rope_cases import FIXED, make_inputs

# (shape of q, keys): every split of the head (one dot, two, either padded), and every kind of number of queries and of
# keys: below a tile, whole tiles, more; as many of both or not.
SHAPES = [
    ((2, 24, 2, 72), 70),
    ((1, 1, 3, 24), 1),
    ((1, 65, 1, 80), 33),
    ((1, 130, 1, 128), 130),
    ((1, 128, 1, 72), 128),
    ((1, 128, 1, 72), 65),
    ((1, 65, 1, 72), 128),
    ((1, 64, 2, 96), 64),
    ((2, 5, 1, 20), 3),
]
CASES = [*((*shape, BF16) for shape in SHAPES), ((1, 70, 2, 72), 70, FP16)]
FP32_CASES = [
    *(((2, 9, 2, 72), 9, None), ((1, 1, 3, 24), 1, None), ((1, 32, 1, 80), 32, None), ((1, 33, 1, 64), 33, 0.3)),
    *(((1, 21, 1, 72), 35, None), ((1, 40, 1, 20), 17, None)),
]


def run(heads, scale=None):
    """(out, lse, {name: gradient}) by the CUDA launchers, for make_grad's gradient."""
    scale = heads[0].shape[-1] ** -0.5 if scale is None else scale
    out, lse = attention_launch.launch_forward(*heads, scale)
    gradients = attention_launch.launch_backward(make_grad(heads), out, lse, *heads, scale)
    return out, lse, dict(zip("qkv", gradients, strict=True))


def check(heads, scale=None):
    out, lse, gradients = run(heads, scale)
    check_logsumexp(heads, lse, scale)
    check_attention(heads, [out], [make_grad(heads)], gradients, scale)
    assert all(tensor.is_contiguous() for tensor in (out, lse, *gradients.values()))


@pytest.fixture
def arch(request, monkeypatch):
    monkeypatch.setattr(attention_launch, "target_arch", lambda device: request.param)
    return request.param


@pytest.fixture
def loads(monkeypatch):
    """Whether each launch read by descriptors."""
    seen = []

    def spy(kernel, grid, device, *args, **meta):
        seen.append(meta["DESCRIPTORS"])
        launch(kernel, grid, device, *args, **meta)

    launch = attention_launch.launch
    monkeypatch.setattr(attention_launch, "launch", spy)
    return seen


@pytest.mark.parametrize("arch", [80, 90], indirect=True)
@pytest.mark.parametrize(("shape", "keys", "dtype"), CASES, ids=str)
def test_matches_reference(shape, keys, dtype, arch, loads):
    check(make_heads(shape, dtype, keys=keys))
    assert loads == [arch >= 90 and shape[-1] % 8 == 0] * 3


@pytest.mark.parametrize(("shape", "keys", "scale"), FP32_CASES, ids=str)
def test_fp32(shape, keys, scale):
    check(make_heads(shape, FP32, keys=keys), scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "arch"), [((2, 24, 2, 72), 80), ((2, 24, 2, 72), 90), ((1, 24, 1, 72), 90)], indirect=["arch"]
)
def test_layouts(shape, layout, arch, loads):
    check(make_heads(shape, BF16, layout, keys=40))
    assert loads == [arch == 90 and layout != "odd pitch"] * 3


@pytest.mark.parametrize("arch", [80, 90], indirect=True)
def test_heads_shared_by_expansion_are_read_by_pointers(arch, loads):
    q, k, v = make_heads((1, 24, 2, 72), BF16)
    check([q, k[:, :, :1].expand(q.shape), v[:, :, :1].expand(q.shape)])
    assert loads == [False] * 3


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # NumPy, about rows past N
@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"), [(80, BF16, 72), (90, BF16, 72), (90, FP32, 64)], indirect=["arch"]
)
def test_large_logits(dtype, head_dim, arch):
    """Scores in the thousands: exp overflows without the running maximum, and so does 2^-lse past N in the backward."""
    q, k, v = make_heads((1, 40, 1, head_dim), dtype, size=1000.0)
    heads = [q.abs(), -k.abs(), v]
    out, lse, gradients = run(heads)
    assert lse.max() < -500  # so that 2^-lse is infinite in fp32
    check_logsumexp(heads, lse)
    check_attention(heads, [out], [make_grad(heads)], gradients)


def test_a_tile_can_raise_the_maximum():
    q, k, v = make_heads((1, 200, 1, 72), BF16)
    k *= torch.linspace(0.1, 8, 200)[None, :, None, None]
    check([q, k, v])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_samples_and_heads_do_not_leak():
    """NaN in one sample and head stays there, though a tile reaches past the end of its sample."""
    heads = make_heads((2, 24, 2, 72), BF16)
    clean = run(heads)
    for tensor in heads:
        tensor[1, :, 1] = float("nan")
    out, lse, gradients = run(heads)
    for made, expected in zip((out, *gradients.values()), (clean[0], *clean[2].values()), strict=True):
        assert made[1, :, 1].isnan().all()
        made[1, :, 1] = expected[1, :, 1]
        assert torch.equal(made, expected)
    assert lse[0].isfinite().all()


QKV_CASES = [((2, 5, 3, 72), BF16), ((1, 70, 1, 72), BF16), ((1, 1, 2, 24), BF16), ((1, 33, 1, 80), BF16)]
QKV_CASES += [((2, 9, 2, 128), BF16), ((1, 6, 3, 20), BF16), ((2, 5, 2, 72), FP16), ((1, 18, 1, 44), FP32)]


def random_grad(inputs, seed=1):
    shape = inputs["qkv"][:, :, 0].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(inputs["qkv"].dtype)


def one_after_the_other(inputs, grad, scale):
    """(out, lse, gradients) by the two ops' launchers, the gradients of q, k and v put side by side between them."""
    arguments = (*inputs.values(), 1e-6)
    heads = qk_norm_rope_launch.launch_forward(*arguments, torch.zeros_like(inputs["qkv"])).unbind(2)
    out, lse = attention_launch.launch_forward(*heads, scale)
    packed = torch.stack(attention_launch.launch_backward(grad, out, lse, *heads, scale), 2)
    return out, lse, *qk_norm_rope_launch.launch_backward(packed, *arguments)


@pytest.mark.parametrize("arch", [80, 90], indirect=True)
@pytest.mark.parametrize(("shape", "dtype"), QKV_CASES)
def test_qkv_attention_is_the_two_ops_bit_for_bit(shape, dtype, arch, monkeypatch):
    inputs, scale = make_inputs(shape, dtype), 0.3
    grad, before = random_grad(inputs), inputs["qkv"].clone()
    expected = one_after_the_other(inputs, grad, scale)
    poison_empty(monkeypatch)
    out, lse = launch_forward(*inputs.values(), 1e-6, scale)
    gradients = launch_backward(grad, out, lse, (*inputs.values(), 1e-6), scale)
    assert_all_equal((out, lse, *gradients), expected)
    assert gradients[0].is_contiguous()
    assert torch.equal(inputs["qkv"], before)


@pytest.mark.parametrize(("shape", "dtype"), [((1, 21, 2, 72), BF16), ((1, 21, 2, 24), FP32)])
def test_qkv_attention_matches_reference(shape, dtype):
    inputs = make_inputs(shape, dtype, strided=False)
    grad, scale = random_grad(inputs), shape[-1] ** -0.5
    out, lse = launch_forward(*inputs.values(), 1e-6, scale)
    made = launch_backward(grad, out, lse, (*inputs.values(), 1e-6), scale)
    gradients = dict(zip(inputs, made, strict=False))  # the tables, last, have none
    check_against_reference(reference.qkv_attention, inputs, [out], [grad], gradients, FIXED)
