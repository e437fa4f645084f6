"""A pipeline whose transformer is adapted or quantised in place samples from what it has become."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddt_fast.pipeline import DDTPipeline
from pipeline_cases import digits, quiet, seeded


def latents(pipe):
    return pipe([3, 4], 4, generator=seeded(0, 1), output_type="latent").images


def test_a_quantised_transformer_is_sampled_from():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, which is not installed")
    pipe = digits()
    exact = latents(pipe)
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    error = (latents(pipe) - exact).norm() / exact.norm()
    assert 0 < error < 0.05


def test_a_lora_adapter_is_sampled_from_switched_off_saved_loaded_and_unloaded(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, which is not installed")
    torch.manual_seed(0)
    pipe = digits()
    exact = latents(pipe)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["qkv", "w2"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    adapted = latents(pipe)
    with pytest.raises(ValueError, match="the transformer is adapted or quantised"):
        pipe.save_pretrained(tmp_path / "a")
    assert (adapted - exact).norm() / exact.norm() > 0.01
    pipe.transformer.disable_adapters()
    torch.testing.assert_close(latents(pipe), exact, rtol=1e-4, atol=1e-4)
    pipe.transformer.enable_adapters()
    assert torch.equal(latents(pipe), adapted)
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    settings = pipe.transformer.peft_config["default"].to_dict()
    DDTPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=settings)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert all(name.startswith("transformer.") and "lora" in name for name in load_file(file))
    for source in (tmp_path, file):
        pipe = digits()
        pipe.load_lora_weights(source, adapter_name="mine")
        assert pipe.get_list_adapters() == {"transformer": ["mine"]}
        assert torch.equal(latents(pipe), adapted)
        pipe.unload_lora_weights()
        assert torch.equal(latents(pipe), exact)
        assert pipe.transformer.is_plain


def test_wrong_lora_weights_are_refused(tmp_path):
    pytest.importorskip("peft", reason="needs peft, which is not installed")
    pipe, file = digits(), tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(ValueError, match=r"LoRA .*pytorch_lora_weights\.safetensors does not exist"):
        pipe.load_lora_weights(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read: it is empty"):
        pipe.load_lora_weights(tmp_path)
    save_file({"unet.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"holds no LoRA of a transformer, only unet\.lora_A\.weight"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="transformer_lora_layers is empty"):
        pipe.save_lora_weights(tmp_path, {})


def test_model_cpu_offload_draws_the_same(latent_model):
    pytest.importorskip("accelerate", reason="needs accelerate, which is not installed")
    pipe = quiet(DDTPipeline.from_pretrained(latent_model))
    expected = pipe([2], generator=seeded(0), output_type="pt").images
    pipe.enable_model_cpu_offload(device="cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(2):
        images = pipe([2], generator=seeded(0), output_type="pt").images.cpu()
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
        assert pipe.transformer.device.type == pipe.vae.device.type == "cpu"


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_component_that_is_offloaded_in_another_way_is_named(latent_model, name):
    pipe = quiet(DDTPipeline.from_pretrained(latent_model))
    getattr(pipe, name)._hf_hook = object()
    with pytest.raises(ValueError, match=f"^the {name} is offloaded, which the pipeline would bypass"):
        pipe(1, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_model_cpu_offload_without_accelerate_or_gpu_is_refused(monkeypatch):
    pipe = digits()
    for installed, message in ((False, "needs accelerate: pip install accelerate"), (True, "needs a GPU, and torch")):
        monkeypatch.setattr("ddt_fast.pipeline.pipeline.is_accelerate_available", lambda found=installed: found)
        with pytest.raises(ValueError, match=f"enable_model_cpu_offload {message}"):
            pipe.enable_model_cpu_offload()


def test_lora_weights_without_peft_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ddt_fast.pipeline.adapters.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match="LoRA adapters need peft: pip install peft"):
        digits().load_lora_weights(tmp_path)
