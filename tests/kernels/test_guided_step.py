"""guided_step: what a step computes, operators, compilation, bad arguments, costs."""

import pytest
import torch

import ddt_kernels
from ddt_kernels import guided_step_coefficients, reference
from guided_step_cases import check_against_reference, fresh, make_inputs, results
from kernel_testing import BF16, DTYPES, poison_empty, total_bytes

SHAPE = (2, 3, 4, 6)
OPERATOR = torch.ops.ddt_kernels.guided_step.default
VARIANTS = [
    {"guided": False},
    {"guided": True, "steps": None},
    {"guided": False, "differences": 2, "velocities": 1},
    {"guided": True, "differences": 3, "velocities": 3, "noise": True},
]
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "guided", "forecast", "everything"])


def call(function, inputs):
    arguments = fresh(inputs)
    return results(arguments, function(*arguments.values(), patch_size=2))


def assert_equal(made, expected):
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
@EVERY_VARIANT
def test_opcheck(variant):
    inputs = make_inputs(SHAPE, 2, **variant)
    torch.library.opcheck(OPERATOR, (*inputs.values(), torch.empty(SHAPE), 2))


@EVERY_VARIANT
def test_on_a_cpu_the_reference_runs(variant):
    inputs = make_inputs(SHAPE, 2, BF16, **variant)
    expected = call(reference.guided_step, inputs)
    assert_equal(call(ddt_kernels.guided_step, inputs), expected)
    assert_equal(call(ddt_kernels.guided_step_, inputs), expected)
    x = inputs["x"].clone()
    ddt_kernels.guided_step(*inputs.values(), patch_size=2)
    assert torch.equal(inputs["x"], x)
    assert ddt_kernels.guided_step_(*inputs.values(), patch_size=2) is inputs["x"]


@pytest.mark.slow
@EVERY_VARIANT
@pytest.mark.parametrize("function", [ddt_kernels.guided_step, ddt_kernels.guided_step_], ids=["new", "in-place"])
def test_compiles_without_graph_breaks(function, variant):
    inputs = make_inputs(SHAPE, 2, **variant)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(call(compiled, inputs), call(function, inputs))


def test_a_run_with_every_kind_of_step_is_the_samplers_own_arithmetic():
    """Guidance from step 1 on, evaluated at every third step, four velocities and differences, noise: written as lists
    of tensors, newest first, which is how a sampler is defined, and with histories that begin uninitialised."""
    generator = torch.Generator().manual_seed(0)

    def image():
        return torch.randn(SHAPE, generator=generator)

    def tokens(v):
        return torch.nn.functional.unfold(v, 2, stride=2).mT.contiguous()

    x = expected = image()
    velocity_history, difference_history = torch.full((2, 3, *SHAPE), float("nan"))
    velocities, differences = [], []
    for i in range(11):
        cond, uncond, noise = image(), image(), image()
        evaluated = i % 3 == 1
        velocities = [cond, *velocities]
        differences = [cond - uncond] * evaluated + differences
        # Without this step's own difference, the history's three are all there is.
        counts = min(i + 1, 4), min(len(differences), 3 + evaluated)
        c_v, c_d = (torch.randn(count, generator=generator).tolist() for count in counts)
        c_x, c_n = 0.9, 0.1 * (i < 10)
        x = ddt_kernels.guided_step(
            x,
            tokens(cond),
            tokens(uncond) if evaluated else None,
            torch.tensor(guided_step_coefficients(c_v, c_d, c_x, c_n)),
            velocity_history=velocity_history,
            difference_history=difference_history,
            noise=noise,
            patch_size=2,
        )
        for coefficients, values in ((c_v, velocities), (c_d, differences)):
            expected = sum((c * v for c, v in zip(coefficients, values, strict=False)), c_x * expected)
            c_x = 1
        expected = expected + c_n * noise
        torch.testing.assert_close(x, expected)
        for history, values in ((velocity_history, velocities), (difference_history, differences)):
            assert all(map(torch.equal, history, values))


def test_coefficient_rows():
    assert guided_step_coefficients((0.1,)) == (1, 0, 0.1, 0, 0, 0, 0, 0, 0, 0)
    assert guided_step_coefficients((1, 2, 3, 4), (5, 6), 7, 8) == (7, 8, 1, 2, 3, 4, 5, 6, 0, 0)
    for arguments, message in (
        (((),), "velocity_coefficients has length 0; expected 1 to 4"),
        (([1] * 5,), "velocity_coefficients has length 5; expected 1 to 4"),
        (([1], [1] * 5), "difference_coefficients has length 5; expected 0 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            guided_step_coefficients(*arguments)


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_table_is_an_index_error_on_a_cpu(step):
    inputs = make_inputs(SHAPE, 2)
    with pytest.raises(IndexError):
        ddt_kernels.guided_step(*(inputs | {"step": torch.tensor(step)}).values(), patch_size=2)


ALL = make_inputs(SHAPE, 2, velocities=1, differences=1, noise=True)
MISTAKES = [
    ("x", lambda t: t[0], r"x has shape \(3, 4, 6\); expected shape \(B, C, H, W\), not empty"),
    ("x", lambda t: t[:0], r"x has shape \(0, 3, 4, 6\); expected shape \(B, C, H, W\), not empty"),
    ("v_cond", lambda t: t[:, :5], r"v_cond has shape \(2, 5, 12\); expected \(2, 6, 12\)"),
    ("v_cond", lambda t: t.double(), r"v_cond is torch.float64; expected bfloat16, float16 or float32"),
    ("v_uncond", lambda t: t[:1], r"v_uncond has shape \(1, 6, 12\); expected \(2, 6, 12\)"),
    ("coefficients", lambda t: t[0], r"coefficients has shape \(10,\); expected \(steps, 10\), because"),
    ("coefficients", lambda t: t[:, :9], r"coefficients has shape \(3, 9\); expected \(steps, 10\), because"),
    ("coefficients", lambda t: t[:0], r"coefficients has shape \(0, 10\); expected \(steps, 10\), because"),
    ("step", lambda t: None, r"coefficients has shape \(3, 10\); expected \(10,\)"),
    ("step", lambda t: t.repeat(2), r"step has shape \(2,\); expected \(1,\)"),
    ("velocity_history", lambda t: t[0], r"velocity_history has shape .*; expected \(1 to 3, 2, 3, 4, 6\)"),
    ("velocity_history", lambda t: t.repeat(4, 1, 1, 1, 1), r"velocity_history has shape \(4, 2, 3, 4, 6\)"),
    ("difference_history", lambda t: t.repeat(4, 1, 1, 1, 1), r"expected \(1 to 3, 2, 3, 4, 6\)"),
    ("noise", lambda t: t[:1], r"noise has shape \(1, 3, 4, 6\); expected \(2, 3, 4, 6\)"),
]


@pytest.mark.parametrize("op", ["guided_step", "guided_step_"])
@pytest.mark.parametrize(("name", "change", "message"), MISTAKES)
def test_mistakes_are_value_errors(op, name, change, message):
    inputs = fresh(ALL)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        getattr(ddt_kernels, op)(*inputs.values(), patch_size=2)


@pytest.mark.parametrize("op", [ddt_kernels.guided_step, ddt_kernels.guided_step_])
@pytest.mark.parametrize("name", list(ALL))
def test_every_argument_is_checked(op, name):
    """Each argument is refused as a list, with another dtype, device or column stride, and with a gradient."""
    inputs = fresh(ALL)
    tensor = inputs[name]
    cases = [(tensor.tolist(), r"is an? \w+; expected a torch.Tensor")]
    cases += [(tensor.double(), r"is torch.float64; expected (torch.float32|bfloat16, float16 or|torch.int32 or)")]
    if name != "x":
        cases += [(tensor.to("meta"), "is on meta; expected cpu, like x")]
    if name != "step":
        strided = tensor.repeat_interleave(2, -1)[..., ::2]
        cases += [(strided, r"has strides .*; expected a (contiguous tensor|last stride of 1)")]
        cases += [(tensor.clone().requires_grad_(), "requires a gradient; expected torch.no_grad")]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"^{op.__name__}: {name} {message}"):
            op(*(inputs | {name: wrong}).values(), patch_size=2)


@pytest.mark.parametrize("patch_size", [0, -2, 3])
def test_patch_size_must_divide(patch_size):
    with pytest.raises(ValueError, match=f"patch_size is {patch_size}; expected a positive divisor of H 4 and W 6"):
        ddt_kernels.guided_step(*make_inputs(SHAPE, 2).values(), patch_size=patch_size)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("differences", [0, 1, 3])
@pytest.mark.parametrize("velocities", [0, 3])
@pytest.mark.parametrize("noise", [False, True])
def test_cost_is_what_the_operator_reads_and_writes(guided, differences, velocities, noise):
    kind = {"guided": guided, "velocities": velocities, "differences": differences, "noise": noise}
    inputs = make_inputs(SHAPE, 2, BF16, steps=None, **kind)
    read = [tensor for tensor in inputs.values() if tensor is not None]
    written = [inputs["x"], *([inputs["velocity_history"]] if velocities else [])]
    if differences and guided:
        written.append(inputs["difference_history"])
    cost = ddt_kernels.guided_step_cost(*SHAPE, BF16, **kind)
    assert cost.bytes_moved == total_bytes(read + written)
    assert 3 * inputs["x"].numel() <= cost.flops <= 22 * inputs["x"].numel()


@pytest.mark.gpu
@EVERY_VARIANT
@DTYPES
@pytest.mark.parametrize(("shape", "patch_size"), [((5, 4, 32, 32), 2), ((1, 1, 3, 5), 1), ((2, 3, 24, 20), 4)])
def test_on_a_gpu(shape, patch_size, dtype, variant, monkeypatch):
    poison_empty(monkeypatch)
    inputs = make_inputs(shape, patch_size, dtype, device="cuda", **variant)
    for function in (ddt_kernels.guided_step, ddt_kernels.guided_step_):
        arguments = fresh(inputs)
        made = results(arguments, function(*arguments.values(), patch_size=patch_size))
        check_against_reference(inputs, patch_size, made)


@pytest.mark.gpu
def test_a_cuda_graph_walks_the_table_without_the_host():
    inputs = make_inputs((4, 4, 32, 32), 2, BF16, velocities=3, differences=3, steps=5, device="cuda")
    inputs["coefficients"] /= 4
    inputs["step"].zero_()
    static, eager = fresh(inputs), fresh(inputs)

    def run(arguments):
        ddt_kernels.guided_step_(*arguments.values(), patch_size=2)
        arguments["step"] += 1

    run(fresh(inputs))  # compiles, which cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(static)
    for name in ("x", "step", "velocity_history", "difference_history"):
        static[name].copy_(inputs[name])
    for _ in range(5):
        graph.replay()
        run(eager)
    torch.cuda.synchronize()
    assert_equal(results(static, static["x"]), results(eager, eager["x"]))
