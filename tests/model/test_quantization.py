"""int8 against the model it was made from, on small models; exact where exactness is claimed."""

import copy

import pytest
import torch

import golden_data as golden
from ddt_fast.config import SamplingConfig
from ddt_fast.device import cpu_has_bf16, cpu_has_int8
from ddt_fast.model import quantization
from ddt_fast.model.fused import FusedDDT
from ddt_fast.model.quantization import ZERO_POINT, Int8Attention, Int8Linear, quantize_int8, quantize_rows
from ddt_fast.sampling import sample
from golden_data import relative_error


def fused(name: str = "tiny_h48_d24") -> FusedDDT:
    return FusedDDT.from_reference(golden.model(name))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["packed", "plain"])
def gemm(request, monkeypatch):
    """Either GEMM that may be behind a layer."""
    if request.param == "plain":
        monkeypatch.setattr(quantization, "pack_int8_weight", lambda weight: None)
    elif quantization.pack_int8_weight(torch.ones(4, 4, dtype=torch.int8)) is None:
        pytest.skip("this CPU has no packed int8 GEMM")


def in_float64(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The formula of the module, from the same int8 numbers, without any rounding after them."""
    (rows, scale), (columns, column_scale) = quantize_rows(x.flatten(0, -2)), quantize_rows(weight)
    y = (rows.double() * scale.double()) @ (columns.double() * column_scale.double()).T
    return (y if bias is None else y + bias.double()).unflatten(0, x.shape[:-1])


def test_rows_are_rounded_to_the_nearest_of_255_numbers():
    x = random(33, 170) * torch.logspace(-3, 3, 33)[:, None]
    rows, scale = quantize_rows(x)
    assert rows.dtype == torch.int8
    assert torch.equal(rows.int().abs().amax(1), torch.full((33,), 127, dtype=torch.int32))
    assert ((rows * scale - x).abs() <= scale * 0.5001).all()
    unsigned, same_scale = quantize_rows(x, signed=False)
    assert unsigned.dtype == torch.uint8
    assert torch.equal(unsigned.int() - ZERO_POINT, rows.int())
    assert torch.equal(same_scale, scale)


def test_rows_of_zeros_stay_zero_and_nan_stays_visible(gemm):
    x = torch.zeros(3, 8)
    x[1, 2] = float("nan")
    rows, scale = quantize_rows(x)
    assert torch.equal((rows * scale)[[0, 2]], torch.zeros(2, 8))
    y = Int8Linear(random(5, 8), None)(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], torch.zeros(2, 5))


@pytest.mark.parametrize("width", [1, 16, 129])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_is_the_exact_sum_of_its_int8_products(gemm, width, has_bias):
    # Rows of one GEMV, of few and of many samples; widths that no vector length divides; sums scaled in several chunks.
    for shape in [(1, 1, 64), (2, 1, 170), (3, 5, 341), (1, 17, 7), (2, 40, 1), (2, 3000, 8)]:
        x, weight = random(*shape), random(width, shape[-1], seed=1)
        bias = random(width, seed=2) if has_bias else None
        y = Int8Linear(weight, bias)(x)
        assert y.dtype == torch.float32
        assert relative_error(y, in_float64(weight, bias, x)) < 1e-6, shape


def test_sums_of_the_largest_products_do_not_saturate(gemm):
    ones = Int8Linear(torch.ones(16, 3072), None)
    for sign in (1.0, -1.0):
        y = ones(torch.full((4, 3072), sign))
        torch.testing.assert_close(y, torch.full((4, 16), 3072.0 * sign), rtol=1e-6, atol=0)


@pytest.mark.parametrize("given", [None, torch.float32])
def test_the_result_is_of_the_weights_dtype_or_the_one_asked_for(gemm, given):
    x, weight = random(2, 9, 64).bfloat16(), random(48, 64, seed=1).bfloat16()
    y = Int8Linear(weight, None, given)(x)
    assert y.dtype == (given or torch.bfloat16)
    assert relative_error(y, in_float64(weight, None, x)) < (1e-6 if given else 2**-8)


@pytest.mark.parametrize("name", golden.MODELS)
def test_attention_with_its_pairs_apart_is_the_same_attention(name):
    # 8 bits are then all that differs, and they differ alike: rows keep their numbers and tokens their scales.
    model = fused(name)
    attn = model.blocks[0].attn
    for norm in (attn.q_norm, attn.k_norm):
        norm.weight.data.copy_(1 + 0.3 * random(norm.weight.shape[0]))
    x = random(2, 16, model.config.hidden_size)
    rotary = model.rotary(torch.zeros(1, 1, 4 * model.config.patch_size, 4 * model.config.patch_size))
    with torch.no_grad():
        assert relative_error(Int8Attention(attn, torch.float32)(x, *rotary), attn(x, *rotary)) < 0.03


@pytest.mark.parametrize("name", golden.MODELS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.01), (torch.bfloat16, 0.02)])
def test_a_quantised_model_is_close_and_the_error_is_measured(name, dtype, limit):
    model, io = fused(name).to(dtype), golden.tensors(name)
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_int8(model)
    x = io["x"].to(dtype)
    error = quantization.quantization_error(model, quantized, x, io["t"], io["y"])
    with torch.no_grad():
        expected = relative_error(quantized(x, io["t"], io["y"])[0].double(), model(x, io["t"], io["y"])[0].double())
    assert error == pytest.approx(expected)
    assert 1e-4 < error < limit
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert quantization.quantization_error(model, model, x, io["t"], io["y"]) == 0


def test_every_large_linear_is_quantised():
    model = quantize_int8(fused())
    left = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert left == ["x_embedder.proj", "s_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    block = model.blocks[0]
    widths = [len(layer.scale) for layer in (block.attn.qkv, block.attn.proj, block.mlp.w13, block.mlp.w2)]
    assert widths == [3 * 48, 48, 2 * model.config.mlp_hidden_size, 48]


def test_spreading_keeps_products_and_shortens_tails():
    for size in (128, 170, 341):
        x, y = random(64, size).double() ** 3, random(64, size, seed=1).double()
        spread = quantization._spread(x)
        torch.testing.assert_close(spread @ quantization._spread(y).T, x @ y.T)
        assert size != 128 or spread.abs().amax(1).mean() < 0.7 * x.abs().amax(1).mean()


def test_a_run_is_sampled_in_int8():
    model, io = fused(), golden.tensors("tiny_h48_d24")
    forecasts = {"state_forecast": "linear", "guidance_every": 2, "guidance_forecast": "linear"}
    config = SamplingConfig(num_steps=12, refresh_every=3, **forecasts)
    expected = sample(model, io["xT"], io["y"], config)
    result = sample(quantize_int8(model), io["xT"], io["y"], config)
    assert 0 < relative_error(result, expected) < 0.01


def test_strides_of_single_rows_and_columns_do_not_matter(gemm):
    x, layer = random(1, 64), Int8Linear(random(48, 64, seed=1), None)
    strided = x.as_strided((1, 64), (1, 1))
    assert torch.equal(layer(strided), layer(x))
    # What a compiler may choose for the int8 rows, which torch._int_mm takes at its word.
    column, weight = random(40, 1), random(16, 1, seed=1)
    y = Int8Linear(weight, None)(column.as_strided((40, 1), (1, 7)))
    assert relative_error(y, in_float64(weight, None, column)) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_int8(golden.model("tiny_h48_d24")), "for FusedDDT, not DDT"),
        (lambda: quantize_int8(quantize_int8(fused())), "already"),
        (lambda: quantize_int8(fused().to("meta")), "on a CPU, but this one is on meta"),
        (lambda: quantize_int8(fused()).state_dict(), "cannot be saved or loaded"),
    ],
)
def test_what_cannot_be_done_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("units", "bf16", "int8"),
    [
        ({"avx512_bf16": True, "avx512_vnni": True}, True, True),
        ({"avx2": True, "amx_bf16": False, "avx_vnni": True}, False, True),
        ({"neon": True, "bf16": True}, True, False),
        ({}, False, False),
        (None, True, False),  # a PyTorch without a table of them
    ],
)
def test_units_of_the_cpu(monkeypatch, units, bf16, int8):
    if units is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        has = {"_is_avx512_bf16_supported": True, "_is_vnni_supported": False, "_is_amx_tile_supported": False}
        for name, supported in has.items():
            monkeypatch.setattr(torch.cpu, name, lambda supported=supported: supported)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert (cpu_has_bf16(), cpu_has_int8()) == (bf16, int8)
