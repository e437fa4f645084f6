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
    {"guided": True, "differences": 2, "velocities": 3, "noise": True},
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
    """Guidance evaluated at every third step and forecast between, four velocities, noise: written as lists of tensors,
    newest first, which is how a sampler is defined, and with histories that begin uninitialised."""
    generator = torch.Generator().manual_seed(0)
    steps, scale = 8, 2.5

    def image():
        return torch.randn(SHAPE, generator=generator)

    def tokens(v):
        return torch.nn.functional.unfold(v, 2, stride=2).mT.contiguous()

    x = expected = image()
    nan = float("nan")
    velocity_history, difference_history = torch.full((3, *SHAPE), nan), torch.full((2, *SHAPE), nan)
    velocities, differences = [], []
    for i in range(steps):
        cond, uncond, noise = image(), image(), image()
        measured, guided = i >= 1 and i % 3 == 1, i >= 1
        order = min(i + 1, 4)
        c_v = torch.randn(order, generator=generator).tolist()
        weights = [] if not guided else [1.0] if measured or i < 4 else [1.5, -0.5]
        x_coefficient, noise_coefficient = 0.9, 0.1 if i < steps - 1 else 0.0
        row = guided_step_coefficients(c_v, [(scale - 1) * w for w in weights], x_coefficient, noise_coefficient)
        x = ddt_kernels.guided_step(
            x,
            tokens(cond),
            tokens(uncond) if measured else None,
            torch.tensor(row),
            velocity_history=velocity_history,
            difference_history=difference_history,
            noise=noise,
            patch_size=2,
        )

        if measured:
            differences = [cond - uncond, *differences]
        v = cond + (scale - 1) * sum(w * d for w, d in zip(weights, differences, strict=False))
        velocities = [v, *velocities]
        expected = x_coefficient * expected + sum(c * v for c, v in zip(c_v, velocities, strict=False))
        expected = expected + noise_coefficient * noise
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(velocity_history[: min(i + 1, 3)], torch.stack(velocities[:3]))
    torch.testing.assert_close(difference_history, torch.stack(differences[:2]))


def test_coefficient_rows():
    assert guided_step_coefficients((0.1,)) == (1, 0, 0, 0, 0.1, 0, 0, 0)
    assert guided_step_coefficients((1, 2, 3, 4), (5, 6), 7, 8) == (7, 8, 5, 6, 1, 2, 3, 4)
    for arguments, message in (
        (((),), "velocity_coefficients has length 0; expected 1 to 4"),
        (([1] * 5,), "velocity_coefficients has length 5; expected 1 to 4"),
        (([1], [1] * 3), "difference_coefficients has length 3; expected at most 2"),
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
    ("coefficients", lambda t: t[0], r"coefficients has shape \(8,\); expected \(8, 8\)"),
    ("coefficients", lambda t: t[:, :7], r"coefficients has shape \(3, 7\); expected \(3, 8\)"),
    ("coefficients", lambda t: t[:0], r"coefficients has shape \(0, 8\); expected \(1, 8\)"),
    ("step", lambda t: None, r"coefficients has shape \(3, 8\); expected \(8,\)"),
    ("step", lambda t: t.repeat(2), r"step has shape \(2,\); expected \(1,\)"),
    ("velocity_history", lambda t: t[0], r"velocity_history has shape .*; expected \(1 to 3, 2, 3, 4, 6\)"),
    ("velocity_history", lambda t: t.repeat(4, 1, 1, 1, 1), r"velocity_history has shape \(4, 2, 3, 4, 6\)"),
    ("difference_history", lambda t: t.repeat(3, 1, 1, 1, 1), r"expected \(1 to 2, 2, 3, 4, 6\)"),
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
    cases = [(tensor.tolist(), r"is a \w+; expected a torch.Tensor")]
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
@pytest.mark.parametrize("differences", [0, 1, 2])
@pytest.mark.parametrize("velocities", [0, 3])
@pytest.mark.parametrize("noise", [False, True])
def test_cost_is_what_the_operator_reads_and_writes(guided, differences, velocities, noise):
    kind = {"guided": guided, "velocities": velocities, "differences": differences, "noise": noise}
    inputs = make_inputs(SHAPE, 2, BF16, steps=None, **kind)
    read = [tensor for tensor in inputs.values() if tensor is not None]
    written = [inputs["x"], *([inputs["velocity_history"]] if velocities else [])]
    if differences and guided:  # its oldest entry is written, never read
        read.append(inputs["difference_history"][1:])
    cost = ddt_kernels.guided_step_cost(*SHAPE, BF16, **kind)
    assert cost.bytes_moved == total_bytes(read + written)
    assert 3 * inputs["x"].numel() <= cost.flops <= 20 * inputs["x"].numel()


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
    inputs = make_inputs((4, 4, 32, 32), 2, BF16, velocities=3, differences=2, steps=5, device="cuda")
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
