"""What the kernel tests share: the tolerance rule, NaN-filled allocations, gradients of a function."""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor


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


def with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients in every input) for the given gradients of the outputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [output.detach() for output in outputs], list(torch.autograd.grad(outputs, leaves, list(grads)))


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
    return [outputs] if isinstance(outputs, Tensor) else list(outputs), [], operators


def check_compiles(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    operator: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> None:
    """Compiled for a CPU, `function` is plain PyTorch, whose gradients round in another order; `operator`, which it
    calls where it is not compiled, stays itself, bit for bit."""
    outputs, gradients = with_gradients(function, inputs, grads)
    for compiled, opaque in ((function, False), (operator, True)):
        made, made_gradients, operators = compiled_results(compiled, inputs, grads)
        assert bool(operators) == opaque, operators
        assert all(torch.equal(a, b) for a, b in zip(made, outputs, strict=True))
        for a, b in zip(made_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if opaque else {}))
    made, _, operators = compiled_results(function, inputs)
    assert not operators
    assert all(torch.equal(a, b) for a, b in zip(made, outputs, strict=True))


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
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes fresh allocations of floats NaN, so that an element a kernel forgets to write cannot pass for right."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
