"""A pipeline whose transformer is adapted or quantised in place samples from what it has become."""

import pytest
import torch

from pipeline_cases import digits, seeded


def latents(pipe):
    return pipe([3, 4], 4, generator=seeded(0, 1), output_type="latent").images


def test_a_quantised_transformer_is_sampled_from():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, which is not installed")
    pipe = digits()
    exact = latents(pipe)
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    error = (latents(pipe) - exact).norm() / exact.norm()
    assert 0 < error < 0.05


def test_a_lora_adapter_is_sampled_from_and_can_be_switched_off(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, which is not installed")
    torch.manual_seed(0)
    pipe = digits()
    exact = latents(pipe)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "w2"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    adapted = latents(pipe)
    with pytest.raises(ValueError, match="the transformer is adapted or quantised"):
        pipe.save_pretrained(tmp_path / "a")
    assert (adapted - exact).norm() / exact.norm() > 0.01
    pipe.transformer.disable_adapters()
    torch.testing.assert_close(latents(pipe), exact, rtol=1e-4, atol=1e-4)
    pipe.transformer.enable_adapters()
    assert torch.equal(latents(pipe), adapted)
