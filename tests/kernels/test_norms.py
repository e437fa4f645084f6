"""The norm family: tiles; modulations forecast from cached ones, with their operators, refusals and costs."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ddt_kernels
from ddt_kernels import norm_launch, reference
from kernel_testing import (
    BF16,
    DTYPES,
    FP32,
    FP64,
    as_list,
    assert_all_equal,
    check_against_reference,
    compiled_results,
    poison_empty,
    total_bytes,
)
from norm_cases import FORECAST_OPS, INPUTS, function_of, keeps, make_forecast_inputs, make_inputs, with_forecast

SHAPE = (2, 3, 20)
OPERATOR = torch.ops.ddt_kernels.norm_modulate.default
GRANULARITIES = pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
HISTORIES = pytest.mark.parametrize("history", [2, 3])
EVERY_OP = pytest.mark.parametrize("op", FORECAST_OPS)


def call(op, inputs, forecast):
    return as_list(function_of(op, ddt_kernels)(*inputs.values(), forecast=forecast))


def operator_args(op, inputs, forecast):
    return [*(inputs.get(name) for name in INPUTS), *forecast, 1e-6, keeps(op)]


@pytest.mark.slow
@EVERY_OP
@GRANULARITIES
@HISTORIES
def test_opcheck(op, per_token, history):
    torch.library.opcheck(OPERATOR, operator_args(op, *make_forecast_inputs(op, SHAPE, per_token, FP32, history)))


@pytest.mark.slow
@HISTORIES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
def test_the_reference_sums_in_fp32_and_rounds_once(dtype, history, compiled):
    cached, weights = torch.randn(history, 2, 3, 20, dtype=FP64).to(dtype), torch.randn(4, history)
    for row, step in ((2, torch.tensor(2)), (1, torch.tensor([1], dtype=torch.int32))):
        made = reference.forecast(cached, weights, step)
        if compiled:
            ((made,), _, _) = compiled_results(reference.forecast, [cached, weights, step])
        exact = torch.einsum("k,kbnc->bnc", weights[row].double(), cached.double())
        assert made.dtype == dtype
        bound = cached.double().abs().sum(0) * weights.abs().max().double()
        fine = torch.finfo(FP64 if dtype == FP64 else FP32).eps
        assert ((made.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 4 * fine * bound).all()


@EVERY_OP
@GRANULARITIES
@HISTORIES
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=["bf16", "fp32", "fp64"])
def test_on_a_cpu_the_reference_runs(op, per_token, history, dtype):
    inputs, forecast = make_forecast_inputs(op, SHAPE, per_token, dtype, history)
    made = call(op, inputs, forecast)
    assert_all_equal(made, as_list(with_forecast(op, forecast)(*inputs.values())))
    assert all(output.is_contiguous() for output in made)


@pytest.mark.slow
@EVERY_OP
@HISTORIES
def test_compiles_without_graph_breaks(op, history):
    inputs, (weights, step) = make_forecast_inputs(op, SHAPE, True, FP32, history)

    def function(weights, step, *tensors):
        return function_of(op, ddt_kernels)(*tensors, forecast=(weights, step))

    def operator(weights, step, *tensors):
        made = OPERATOR(*operator_args(op, dict(zip(inputs, tensors, strict=True)), (weights, step)))
        return [output for output in made if output.numel()]

    expected = call(op, inputs, (weights, step))
    for compiled, opaque in ((function, False), (operator, True)):
        made, _, operators = compiled_results(compiled, [weights, step, *inputs.values()])
        assert bool(operators) == opaque
        torch.testing.assert_close(made, expected, **({"rtol": 0, "atol": 0} if opaque else {}))


def test_another_step_needs_no_other_graph():
    inputs, (weights, step) = make_forecast_inputs("rms_norm_modulate", SHAPE, True, FP32, 2)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ddt_kernels.rms_norm_modulate, fullgraph=True, backend=graphs)
    for row in range(3):
        step.fill_(row)
        made = compiled(*inputs.values(), forecast=(weights, step))
        torch.testing.assert_close([made], call("rms_norm_modulate", inputs, (weights, step)))
    assert graphs.frame_count == 1


@EVERY_OP
def test_exports(op):
    class Module(torch.nn.Module):
        def forward(self, weights, step, *tensors):
            return function_of(op, ddt_kernels)(*tensors, forecast=(weights, step))

    inputs, forecast = make_forecast_inputs(op, SHAPE, True, FP32, 2)
    graph = torch.export.export(Module(), (*forecast, *inputs.values())).graph
    assert any(node.target == OPERATOR for node in graph.nodes)


@pytest.mark.slow
@EVERY_OP
@GRANULARITIES
@pytest.mark.parametrize("row", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.5, -0.5, 0.0)])
def test_what_a_zero_weight_drops_may_be_nan(op, per_token, row):
    inputs, (weights, step) = make_forecast_inputs(op, SHAPE, per_token, FP32, 3)
    weights[1] = torch.tensor(row)
    expected = call(op, inputs, (weights, step))
    for tensor in inputs.values():
        if tensor.ndim == 4:
            tensor[weights[1] == 0] = float("nan")
    made = [call(op, inputs, (weights, step))]
    if row[0] == 1:
        function = partial(function_of(op, ddt_kernels), forecast=(weights, step))
        made.append(compiled_results(function, list(inputs.values()))[0])
    for outputs in made:
        assert all(output.isfinite().all() for output in outputs)
        assert_all_equal(outputs, expected)


@EVERY_OP
@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_table_is_an_index_error_on_a_cpu(op, step):
    inputs, (weights, _) = make_forecast_inputs(op, SHAPE, True, FP32, 2)
    with pytest.raises(IndexError):
        call(op, inputs, (weights, torch.tensor(step)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gate", lambda t: t[0], r"gate has shape \(2, 3, 20\); expected \(K, 2, 1 or 3, 20\), K 2 or 3"),
        ("gate", lambda t: t.repeat(2, 1, 1, 1), r"gate has shape \(4, 2, 3, 20\); expected \(K, 2, 1 or 3, 20\)"),
        ("gate", lambda t: t[:, :, :2], r"gate has shape \(2, 2, 2, 20\); expected \(2, 2, 1, 20\) \(per sample\) or"),
        ("shift", lambda t: t[[0, 0, 1]], r"shift has shape \(3, 2, 3, 20\); expected \(2, 2, 3, 20\), like gate"),
        ("scale", lambda t: t[:, :, :1], r"scale has shape \(2, 2, 1, 20\); expected \(2, 2, 3, 20\), like gate"),
        ("scale", lambda t: t.half(), r"scale is torch.float16; expected torch.float32"),
        ("scale", lambda t: t.repeat(1, 1, 1, 2)[..., ::2], r"scale has strides .*; expected a last stride of 1"),
        ("shift", lambda t: t.to("meta"), r"shift is on meta; expected cpu"),
        ("forecast", lambda f: f[0], r"forecast is a Tensor; expected a tuple \(weights, step\)"),
        ("forecast", lambda f: (*f, None), r"forecast is a tuple of 3; expected a tuple \(weights, step\)"),
        ("weights", lambda t: [[1.0, 0.0]], r"is a list; expected a torch.Tensor"),
        ("weights", lambda t: t[0], r"has shape \(2,\); expected \(steps, 2\)"),
        ("weights", lambda t: t[:0], r"has shape \(0, 2\); expected \(steps, 2\)"),
        ("weights", lambda t: t.double(), r"is torch.float64; expected torch.float32"),
        ("weights", lambda t: t.T.contiguous().T, r"has strides \(1, 3\); expected a contiguous tensor"),
        ("weights", lambda t: t.to("meta"), r"is on meta; expected cpu"),
        ("step", lambda t: 1, r"is an int; expected a torch.Tensor"),
        ("step", lambda t: t.float(), r"is torch.float32; expected torch.int32 or torch.int64"),
        ("step", lambda t: t.repeat(2), r"has shape \(2,\); expected \(\) or \(1,\)"),
        ("step", lambda t: t.to("meta"), r"is on meta; expected cpu"),
    ],
)
def test_mistakes_are_value_errors(name, change, message):
    op = "gated_residual_rms_norm_modulate"
    inputs, forecast = make_forecast_inputs(op, SHAPE, True, FP32, 2)
    weights, step = forecast
    if name == "weights":
        forecast, message = (change(weights), step), rf"forecast\[0\] \(weights\) {message}"
    elif name == "step":
        forecast, message = (weights, change(step)), rf"forecast\[1\] \(step\) {message}"
    elif name == "forecast":
        forecast = change(forecast)
    else:
        inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        call(op, inputs, forecast)


@EVERY_OP
def test_a_history_without_a_forecast_is_refused(op):
    inputs, _ = make_forecast_inputs(op, SHAPE, True, FP32, 2)
    with pytest.raises(ValueError, match=rf"{op}: (gate|shift) has shape \(2, 2, 3, 20\); expected \(2, 1, 20\)"):
        function_of(op, ddt_kernels)(*inputs.values())


@EVERY_OP
def test_nothing_is_differentiated(op):
    inputs, (weights, step) = make_forecast_inputs(op, SHAPE, True, FP32, 2)
    expected = call(op, inputs, (weights, step))
    for name in inputs:
        leaves = inputs | {name: inputs[name].detach().requires_grad_()}
        with pytest.raises(ValueError, match=f"{op}: {name} requires a gradient; expected torch.no_grad"):
            call(op, leaves, (weights, step))
        with torch.no_grad():
            assert_all_equal(call(op, leaves, (weights, step)), expected)
    with pytest.raises(ValueError, match=rf"{op}: forecast\[0\] \(weights\) requires a gradient"):
        call(op, inputs, (weights.clone().requires_grad_(), step))


@EVERY_OP
@GRANULARITIES
@HISTORIES
def test_cost_is_what_the_operator_reads_and_writes(op, per_token, history):
    inputs, forecast = make_forecast_inputs(op, SHAPE, per_token, BF16, history)
    made = getattr(ddt_kernels, f"{op}_cost")(*SHAPE, BF16, per_token, history=history)
    tensors = [*inputs.values(), forecast[0][0], *call(op, inputs, forecast)]
    assert made.bytes_moved == total_bytes(tensors)
    plain = getattr(ddt_kernels, f"{op}_cost")(*SHAPE, BF16, per_token)
    combined = sum(t[0].numel() for t in inputs.values() if t.ndim == 4)
    assert made.flops - plain.flops == (2 * history - 1) * combined  # a product each, and the sums between them


@EVERY_OP
def test_cost_of_what_does_not_exist(op):
    cost = getattr(ddt_kernels, f"{op}_cost")
    with pytest.raises(ValueError, match=f"{op}_cost: history is 4; expected 1, 2 or 3"):
        cost(*SHAPE, BF16, True, history=4)
    with pytest.raises(ValueError, match=f"{op}_cost: history is 2; expected 1: a forecast has no backward pass"):
        cost(*SHAPE, BF16, True, backward=True, history=2)


@pytest.mark.gpu
@EVERY_OP
@GRANULARITIES
@HISTORIES
@DTYPES
@pytest.mark.parametrize("shape", [(3, 24, 72), (2, 40, 341), (8, 256, 1152), (1, 3, 6144)])
def test_on_a_gpu(op, per_token, history, dtype, shape, monkeypatch):
    poison_empty(monkeypatch)
    inputs, forecast = make_forecast_inputs(op, shape, per_token, dtype, history, device="cuda")
    check_against_reference(with_forecast(op, forecast), inputs, call(op, inputs, forecast))
    for outside in (-1, 3):
        made = call(op, inputs, (forecast[0], torch.tensor(outside, device="cuda")))
        assert all(output.isnan().all() for output in made)


@pytest.mark.gpu
@EVERY_OP
@HISTORIES
def test_a_cuda_graph_walks_the_table_without_the_host(op, history):
    inputs, (weights, step) = make_forecast_inputs(op, (4, 256, 1152), True, BF16, history, device="cuda")
    expected = []
    for row in range(3):
        step.fill_(row)
        expected.append(call(op, inputs, (weights, step)))  # also compiles, which cannot be captured
    step.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(op, inputs, (weights, step))
        step.add_(1)
    for row in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert_all_equal(captured, expected[row])


def test_tiles_cover_every_width():
    for channels in range(1, norm_launch.MAX_CHANNELS + 1):
        configs = [norm_launch.forward_config(channels, few_rows) for few_rows in (False, True)]
        for config in (*configs, norm_launch.backward_config(channels)):
            assert config.main <= channels <= config.main + config.tail < 2 * channels + 16
            assert config.num_warps in (1, 2, 4, 8)
            for size in (config.main, config.tail or 1):
                assert size & (size - 1) == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_launches_on_the_tensors_device():
    inputs = make_inputs("rms_norm_modulate", (2, 3, 20), True, FP32, device="cuda:1")
    with torch.cuda.device(0):
        y = ddt_kernels.rms_norm_modulate(*inputs.values())
    torch.testing.assert_close(y, reference.rms_norm_modulate(*inputs.values()))
