"""What the kernel tests share: the tolerance rule, gradients of a function, compilation, NaN-filled allocations."""

import importlib.util
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
COMPILES = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton, in a process that does not interpret",
)
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])


def assert_as_accurate(name: str, actual: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """`actual` may err by twice what plain PyTorch in the same dtype errs, plus two ulps, and no further.

    oracle: the fp64 result from the same (rounded) inputs. Largest errors are compared, element by element with the
    ulps, and root mean squares with half an ulp, which notices a small error everywhere.
    """
    assert actual.shape == plain.shape == oracle.shape, f"{name}: {actual.shape}, {plain.shape}, {oracle.shape}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, {plain.dtype}"
    ulp = torch.finfo(actual.dtype).eps
    error, plain_error = (actual.double() - oracle).abs(), (plain.double() - oracle).abs()
    excess = error - (2 * plain_error.max() + 2 * ulp * oracle.abs())
    assert (excess <= 0).all(), f"{name}: off by {error.max():.3g}, plain PyTorch by {plain_error.max():.3g}"
    rms, plain_rms, size = (t.square().mean().sqrt() for t in (error, plain_error, oracle))
    assert rms <= 2 * plain_rms + ulp / 2 * size, f"{name}: rms error {rms:.3g}, plain PyTorch {plain_rms:.3g}"


def seeded(seed: int, dtype: torch.dtype, device: str | torch.device = "cpu") -> Callable[..., Tensor]:
    """A torch.randn of its own generator, which draws in fp64 and rounds once, so that devices and dtypes agree."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator, dtype=FP64).to(dtype).to(device)


def as_list(outputs: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """What a function of one or of several outputs returned."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def total_bytes(tensors: Iterable[object]) -> int:
    """Bytes of the tensors among the arguments."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def assert_all_equal(made: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients in every input) for the given gradients of the outputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = as_list(function(*leaves))
    return [output.detach() for output in outputs], list(torch.autograd.grad(outputs, leaves, list(grads)))


def check_against_reference(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor] = (),
    gradients: Mapping[str, Tensor] | None = None,
    fixed: Collection[str] = (),
) -> None:
    """The tolerance rule, for what should be function(*inputs.values()) and for the gradients given by name.

    grads: of the outputs; without them the outputs alone are checked. fixed: inputs that have no gradient; the oracle
    takes them as they are.
    """
    names = [name for name in inputs if name not in fixed]

    def run(cast: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        def call(*leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
            return function(*(dict(inputs) | dict(zip(names, leaves, strict=True))).values())

        leaves = [cast(inputs[name]) for name in names]
        if not grads:
            return as_list(call(*leaves)), []
        return with_gradients(call, leaves, [cast(grad) for grad in grads])

    plain, plain_gradients = run(lambda tensor: tensor)
    oracle, oracle_gradients = run(torch.Tensor.double)
    for index, results in enumerate(zip(outputs, plain, oracle, strict=True)):
        assert_as_accurate(f"output {index}", *results)
    if gradients is not None:
        for name, *results in zip(names, plain_gradients, oracle_gradients, strict=True):
            if name in gradients:
                assert_as_accurate(f"gradient of {name}", gradients[name], *results)


def compiled_results(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor], set[str]]:
    """(outputs, gradients, this package's operators in the graph) of `function`, compiled without graph breaks; without
    `grads` for inference."""
    operators: set[str] = set()

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        operators.update(name for node in graph.graph.nodes if "ddt_kernels" in (name := str(node.target)))
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    if grads:
        return *with_gradients(compiled, inputs, grads), operators
    with torch.no_grad():
        outputs = compiled(*inputs)
    return as_list(outputs), [], operators


def kept_for_backward(function: Callable[..., Tensor], *inputs: Tensor) -> dict[int, int]:
    """Elements of every storage that function(*inputs) keeps for its backward pass, by its address."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)
    assert output.requires_grad
    return kept


def check_replays(run: Callable[[], Sequence[Tensor]]) -> None:
    """A CUDA graph of `run` makes, replayed, what it returned without a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Also compiles, which cannot be captured, and makes cuBLAS's workspace of this stream.
        expected = [tensor.clone() for tensor in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_all_equal(captured, expected)


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes fresh allocations of floats NaN, so that an element a kernel forgets to write cannot pass for right."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
