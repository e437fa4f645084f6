"""Every attention backend computes the same; what cannot be used says why; packages are called as documented."""

import importlib.machinery
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ddt_kernels
from ddt_fast.model import attention as package_of_attention
from ddt_fast.model.attention import CONCRETE_BACKENDS, attention, available_backends, backends, resolve_backend

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
CPU_BACKENDS = ("auto", "sdpa_flash", "sdpa_math")
PACKAGES = {
    "flash_attn_2": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
    "xformers": "xformers.ops",
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing resolved or imported before a test, or after it."""
    monkeypatch.setattr(backends, "_imported", {})
    package_of_attention._usable.cache_clear()
    yield
    package_of_attention._usable.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Make the module believe that every device is a GPU of some compute capability, with a complete PyTorch."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(backends, "_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)

    return pretend


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make packages that can really be imported."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(module: str, code: str) -> None:
        folder = tmp_path.joinpath(*module.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(code)
        importlib.invalidate_caches()

    yield make
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("flash_attn", "flash_attn_interface", "xformers"):
            del sys.modules[name]


def packed(B=2, N=20, H=3, D=12, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, N, 3, H, D, generator=generator).to(device, dtype).requires_grad_()


def formula(qkv):
    """softmax(q·kᵀ / √D)·v and its gradient, written out, in fp64."""
    qkv = qkv.detach().double().requires_grad_()
    q, k, v = qkv.unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    return out, torch.autograd.grad(out, qkv, torch.ones_like(out).cumsum(-1))[0]


def run(qkv, backend, function=attention):
    out = function(*qkv.unbind(2), backend)
    return out, torch.autograd.grad(out, qkv, torch.ones_like(out).cumsum(-1))[0]


def assert_close(actual, expected):
    """Within so many ulps of the largest element: sums in another order and other exponentials in fp32 (8 are seen), in
    bf16 the rounding of probabilities and results (0.5 are seen)."""
    ulps = 16 if actual.dtype == torch.float32 else 1
    limit = ulps * torch.finfo(actual.dtype).eps * expected.abs().max()
    assert (actual.double() - expected).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(2, 20, 3, 12), (1, 130, 2, 72), (2, 1, 1, 4), (1, 16, 1, 130)])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_cpu_backends_compute_the_formula_and_its_gradient(backend, shape, dtype):
    qkv = packed(*shape, dtype=dtype)
    for actual, expected in zip(run(qkv, backend), formula(qkv), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        assert_close(actual, expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_layouts_do_not_matter(backend):
    qkv = packed().detach().unbind(2)
    expected = attention(*qkv, backend)
    for heads in ([x.contiguous() for x in qkv], [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]):
        torch.testing.assert_close(attention(*heads, backend), expected)
    assert attention(*qkv, "sdpa_flash").is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiles_as_one_graph_forward_and_backward(backend):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=graphs)
    for tokens in (18, 20, 24):
        qkv = packed(N=tokens)
        for actual, expected in zip(run(qkv, backend, compiled), formula(qkv), strict=True):
            assert_close(actual, expected)
    assert graphs.frame_count == 1, "another number of tokens compiles nothing new"


def test_sdpa_math_and_sdpa_flash_are_different_kernels():
    qkv = packed(N=64, dtype=BF16).detach().unbind(2)
    assert not torch.equal(attention(*qkv, "sdpa_flash"), attention(*qkv, "sdpa_math"))


def test_triton_is_the_kernel_of_ddt_kernels(gpu):
    gpu(9, 0)
    q, k, v = packed().detach().unbind(2)
    assert torch.equal(attention(q, k, v, "triton"), ddt_kernels.attention(q, k, v))  # on a CPU, its reference


@pytest.mark.parametrize(
    ("change", "backend", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "auto", r"q has shape \(20, 3, 12\)"),
        (lambda q, k, v: (q, k[:, :8], v), "auto", r"k has shape \(2, 8, 3, 12\); allowed: \(B, N, H, D\), the same"),
        (lambda q, k, v: (q, k, v.double()), "auto", "v is torch.float64 on cpu; allowed: one floating dtype"),
        (lambda q, k, v: (q, k.to("meta"), v), "auto", "k is torch.float32 on meta"),
        (lambda q, k, v: (q.mT.contiguous().mT, k, v), "auto", r"q has strides .* allowed: 1 for the last dimension"),
        (lambda *qkv: qkv, "flash", r"attention backend is 'flash'; allowed: auto, triton, .*, sdpa_math"),
    ],
)
def test_wrong_arguments_are_refused(change, backend, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*packed().detach().unbind(2)), backend)


@pytest.mark.parametrize("backend", [name for name in CONCRETE_BACKENDS if name not in CPU_BACKENDS])
def test_backends_of_a_gpu_are_refused_on_a_cpu(backend):
    message = f"'{backend}' cannot be used here: needs an NVIDIA GPU .*; this is cpu.*; usable: sdpa"
    with pytest.raises(ValueError, match=message):
        attention(*packed().detach().unbind(2), backend)


# Compute capability, backend, dtype, head dimension and how the reason begins; None for a usable one.
REASONS = [
    ((7, 5), "triton", torch.float16, 72, "needs compute capability 8.0 or newer; this is 7.5"),
    ((9, 0), "triton", torch.float64, 72, "takes bfloat16, float16, float32, not float64"),
    ((9, 0), "triton", BF16, 132, "takes head dimensions up to 128 divisible by 4, not 132"),
    ((9, 0), "triton", torch.float32, 68, None),
    ((8, 0), "flash_attn_3", BF16, 72, "needs compute capability 9.0 or newer, below 10.0; this is 8.0"),
    ((10, 0), "xformers", torch.float32, 72, "takes float32 up to compute capability 9.0, not 10.0"),
    ((9, 0), "xformers", BF16, 68, "takes head dimensions up to 256 divisible by 8, not 68"),
    ((9, 0), "sdpa_cudnn", BF16, 72, None),
    ((9, 0), "sdpa_efficient", torch.float32, 68, None),
]


@pytest.mark.parametrize(("capability", "backend", "dtype", "head_dim", "reason"), REASONS)
def test_limits_are_stated(gpu, capability, backend, dtype, head_dim, reason):
    gpu(*capability)
    found = available_backends(CUDA, dtype, head_dim)[backend]
    assert found is None if reason is None else found.startswith(reason)


def test_what_this_machine_lacks_is_stated(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU of compute capability 8.0" in available_backends(CUDA, BF16, 72)["triton"]
    gpu(9, 0)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    reasons = available_backends(CUDA, BF16, 72)
    assert reasons["sdpa_flash"] == "this PyTorch was built without it: install a CUDA build of PyTorch"
    assert reasons["sdpa_cudnn"].startswith("needs cuDNN 91501, not 91002")


@pytest.mark.parametrize("backend", ["triton", *PACKAGES])
def test_missing_packages_are_named_with_how_to_get_them(gpu, monkeypatch, backend):
    gpu(9, 0)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    install = rf"{PACKAGES.get(backend, 'triton')} is not installed: (pip install|build hopper/)"
    with pytest.raises(ValueError, match=f"{install}.*; usable: sdpa_cudnn, sdpa_flash, sdpa_efficient, sdpa_math"):
        resolve_backend(backend, CUDA, BF16, 72)


@pytest.mark.parametrize("returned", ["v + 1", "(v + 1, None)"])
@pytest.mark.parametrize("backend", PACKAGES)
def test_packages_are_called_as_documented(gpu, package, backend, returned):
    """Versions 3 and 4 of flash-attn return the log-sum-exp beside the output, or used to."""
    gpu(9, 0)
    code = """CALLS = []
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    CALLS.append((q, k, v, softmax_scale, causal))
    return {returned}
def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert attn_bias is None and p == 0.0
    CALLS.append((query, key, value, scale, False))
    return value + 1"""
    package(PACKAGES[backend], code.format(returned=returned))
    q, k, v = packed(D=16, dtype=BF16).detach().unbind(2)
    assert torch.equal(attention(q, k, v, backend), v + 1)
    (call,) = sys.modules[PACKAGES[backend]].CALLS
    assert all(given is tensor for given, tensor in zip(call[:3], (q, k, v), strict=True))  # in place, (B, N, H, D)
    assert call[3:] == (0.25, False)
    assert available_backends(CUDA, BF16, 16)[backend] is None


def test_flash_attn_4_alone_is_traced_and_is_not_flash_attn_2(gpu, package):
    gpu(9, 0)
    package("flash_attn.cute", "def flash_attn_func(q, k, v, softmax_scale, causal): return q * softmax_scale + v")
    usable = available_backends(CUDA, BF16, 72)
    assert usable["flash_attn_4"] is None
    assert usable["flash_attn_2"] == "flash_attn is not installed: pip install flash-attn --no-build-isolation"
    torch._dynamo.reset()
    q, k, v = packed(D=16, dtype=BF16).detach().unbind(2)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, "flash_attn_4"), q * 0.25 + v)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise OSError('undefined symbol: _ZN3c10\\nmore')", r"\(OSError: undefined symbol: _ZN3c10\)"),
        ("import cutlass_that_is_not_there", r"\(ModuleNotFoundError: No module named 'cutlass_that_is_not_there'\)"),
        ("", r"\(AttributeError: module 'flash_attn_interface' has no attribute 'flash_attn_func'\)"),
    ],
)
def test_a_package_that_fails_to_import_is_reported_with_its_error(gpu, package, code, message):
    gpu(9, 0)
    package("flash_attn_interface", code)
    with pytest.raises(ValueError, match=f"flash_attn_interface is installed but fails to import {message}; usable: "):
        resolve_backend("flash_attn_3", CUDA, BF16, 72)


def test_looking_imports_nothing_that_could_not_be_used(gpu, package):
    for module in PACKAGES.values():
        package(module, "raise SystemExit('imported')")
    reasons = available_backends(CPU, BF16, 72)
    assert all("installed" not in str(reasons[backend]) for backend in PACKAGES)
    gpu(9, 0)
    assert resolve_backend("auto", CUDA, BF16, 72, 256) == "triton"
    assert not {"flash_attn", "flash_attn_interface", "xformers"} & set(sys.modules)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected", "without_triton"),
    [
        ((8, 0), BF16, 72, "triton", "sdpa_flash"),
        ((9, 0), BF16, 72, "triton", "sdpa_cudnn"),
        ((9, 0), torch.float16, 64, "triton", "sdpa_cudnn"),
        ((10, 3), BF16, 128, "triton", "sdpa_cudnn"),
        ((8, 0), torch.float32, 72, "sdpa_efficient", "sdpa_efficient"),
        ((8, 0), BF16, 160, "sdpa_flash", "sdpa_flash"),
        ((7, 5), torch.float16, 72, "sdpa_efficient", "sdpa_efficient"),
    ],
)
def test_auto_on_a_gpu(gpu, monkeypatch, capability, dtype, head_dim, expected, without_triton):
    gpu(*capability)
    assert resolve_backend("auto", CUDA, dtype, head_dim, 256) == expected
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert resolve_backend("auto", CUDA, dtype, head_dim) == without_triton
    if without_triton == "sdpa_cudnn":
        assert resolve_backend("auto", CUDA, dtype, head_dim, tokens=1) == "sdpa_flash"


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64])
def test_auto_on_a_cpu(dtype, recwarn):
    for tokens, gradient in ((16, False), (256, False), (256, True), (None, True)):
        assert resolve_backend("auto", "cpu", dtype, 72, tokens, gradient) == "sdpa_flash"
    few = backends.FEW_TOKENS.get(dtype)
    if few is not None:  # the gradients of few tokens are those of math
        for tokens, expected in ((few, "sdpa_math"), (few + 1, "sdpa_flash")):
            assert resolve_backend("auto", "cpu", dtype, 72, tokens, gradient=True) == expected
            qkv = packed(N=tokens, dtype=dtype)
            assert torch.equal(attention(*qkv.unbind(2)), attention(*qkv.unbind(2), expected))
            with torch.no_grad():
                assert torch.equal(attention(*qkv.unbind(2)), attention(*qkv.unbind(2), "sdpa_flash"))
    assert resolve_backend("auto", "meta", dtype, 72) == "sdpa_math"
    assert attention(*packed(device="meta").unbind(2)).shape == (2, 20, 3, 12)
    assert not len(recwarn)


def test_math_on_a_gpu_is_warned_about_once(gpu, recwarn):
    gpu(7, 5)
    for _ in range(2):
        assert resolve_backend("auto", CUDA, BF16, 72) == "sdpa_math"
    (warning,) = recwarn
    assert "attention runs as sdpa_math, which is slow" in str(warning.message)
    assert "needs compute capability 8.0 for bfloat16, not 7.5" in str(warning.message)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 256, 16, 72), (2, 200, 4, 64), (1, 65, 2, 128)])
def test_every_usable_backend_is_right_on_cuda(shape, dtype):
    """It errs at most twice as far as sdpa_math, plus 2 ulps of the largest element; in fp32 32, which admits other
    exponentials and products of three TF32 ones, and no single TF32."""
    qkv = packed(*shape, dtype=dtype, device="cuda")
    exact = formula(qkv)

    def errors(backend):
        return [(x.double() - y).abs().max().item() for x, y in zip(run(qkv, backend), exact, strict=True)]

    floor = (2 if dtype.itemsize == 2 else 32) * torch.finfo(dtype).eps
    limits = [2 * error + floor * x.abs().max().item() for error, x in zip(errors("sdpa_math"), exact, strict=True)]
    usable = [name for name, reason in available_backends(CUDA, dtype, shape[-1]).items() if reason is None]
    assert resolve_backend("auto", CUDA, dtype, shape[-1], shape[1]) in usable
    for name in usable:
        assert all(error <= limit for error, limit in zip(errors(name), limits, strict=True)), name

    compiled = torch.compile(attention, fullgraph=True)(*qkv.unbind(2))
    torch.testing.assert_close(compiled, attention(*qkv.unbind(2)))
    torch.autograd.grad(compiled.sum(), qkv)
