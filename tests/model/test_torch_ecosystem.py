"""The models among PyTorch's tools: torch.export, torchao, PEFT; each test is how it is done."""

import pytest
import torch
import torch.nn.functional as F

import golden_data as golden
from ddt_fast import FusedDDT, SamplingConfig, load_model
from ddt_fast.model.settings import EMBEDDED_CHECKPOINT
from ddt_fast.sampling import sample
from ddt_fast.sampling.noise import seeded_noise


def digits():
    return load_model(EMBEDDED_CHECKPOINT)


@pytest.mark.slow
def test_the_reference_can_be_exported():
    model, tensors = golden.model("tiny_h48_d24"), golden.tensors("tiny_h48_d24")
    x, t, y = (tensors[name] for name in "xty")
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x, t, y), dynamic_shapes=[{0: batch}] * 3)
    with torch.no_grad():
        for repeats in (1, 3):
            arguments = [torch.cat([tensor] * repeats) for tensor in (x, t, y)]
            for actual, expected in zip(exported.module()(*arguments), model(*arguments), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_torchao_quantizes_the_reference_and_the_fused_model():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, which is not installed")
    noise, labels = seeded_noise(range(4), (1, 8, 8))[0], torch.tensor([3, 1, 4, 1])
    config = SamplingConfig(num_steps=6, refresh_every=2)
    expected = sample(digits(), noise, labels, config)

    for model in (digits(), FusedDDT.from_reference(digits())):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        for layer in (model.blocks[0].attn.qkv, model.blocks[0].mlp.w1, model.blocks[0].mlp.w2):
            assert type(layer.weight.data) is not torch.Tensor
        error = golden.relative_error(sample(model, noise, labels, config), expected)
        assert 0 < error < 0.05


def test_peft_trains_lora_on_the_linears_of_the_reference():
    peft = pytest.importorskip("peft", reason="needs peft, which is not installed")
    torch.manual_seed(0)
    base = digits()
    config = peft.LoraConfig(r=4, target_modules=["qkv", "proj", "w1", "w2", "w3"], exclude_modules=".*embedder.*")
    adapted = peft.get_peft_model(base, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert 0 < sum(parameter.numel() for parameter in trained) < sum(p.numel() for p in adapted.parameters()) / 4
    x, t, y = torch.randn(8, 1, 8, 8), torch.rand(8), torch.arange(8)
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(8):
        losses.append(F.mse_loss(adapted(x, t, y)[0], x))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    # Merged, it is an ordinary DDT again, which fuses and samples; a FusedDDT with the same adapters needs no merging.
    beside = peft.get_peft_model(FusedDDT.from_reference(digits()), config)
    beside.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(beside(x, t, y)[0].detach(), adapted(x, t, y)[0].detach(), rtol=1e-4, atol=1e-4)
    expected = adapted(x, t, y)[0].detach()
    merged = FusedDDT.from_reference(adapted.merge_and_unload())
    torch.testing.assert_close(merged(x, t, y)[0].detach(), expected, rtol=1e-4, atol=1e-4)
