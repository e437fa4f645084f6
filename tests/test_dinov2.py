"""DINOv2 against its equations, and what is refused."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ddt_fast.dinov2 import DinoV2
from golden_data import relative_error


@pytest.fixture(scope="module", params=["dinov2", "dinov2_with_registers"])
def dinov2(request, tmp_path_factory):
    """A small DINOv2 with random weights, 3 x 3 position embeddings, saved."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
    torch.manual_seed(0)
    if request.param == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    else:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=4)
        model = transformers.Dinov2WithRegistersModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    folder = tmp_path_factory.mktemp("dinov2") / "dinov2"
    model.save_pretrained(folder)
    return folder


def bicubic_matrix(size: int, target: int) -> Tensor:
    """Cubic convolution with a = -0.75 between pixel centres, edges repeated: (target, size) float64."""
    matrix = torch.zeros(target, size, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * size / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d, a = abs(centre - tap), -0.75
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, min(max(tap, 0), size - 1)] += weight
    return matrix


def expected_tokens(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """Patch tokens by the equations of a ViT with layer scale, from (B, 3, S, S) uint8 images, in float64."""
    w = {name: weight.double() for name, weight in weights.items()}
    side = images.shape[-1] * 224 // 256
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(2, 3, 1, 1)
    resize = bicubic_matrix(images.shape[-1], side)
    pixels = resize @ ((images.double() / 255 - mean) / std) @ resize.T
    patches = functional.unfold(pixels, 14, stride=14).transpose(1, 2)
    kernel = w["embeddings.patch_embeddings.projection.weight"].flatten(1)
    patches = patches @ kernel.T + w["embeddings.patch_embeddings.projection.bias"]

    positions, grid = w["embeddings.position_embeddings"][0], side // 14
    planes = positions[1:].T.reshape(-1, 3, 3).float().numpy()
    # Pillow's bicubic filter widens when it shrinks, which is what antialiasing means.
    resized = [np.asarray(Image.fromarray(p).resize((grid, grid), Image.Resampling.BICUBIC)) for p in planes]
    patches = patches + torch.from_numpy(np.stack(resized)).double().flatten(1).T
    first = (w["embeddings.cls_token"] + positions[:1]).expand(len(images), -1, -1)
    registers = w.get("embeddings.register_tokens", torch.empty(1, 0, positions.shape[1]).double())
    x = torch.cat([first, registers.expand(len(images), -1, -1), patches], 1)

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for layer in ("encoder.layer.0", "encoder.layer.1"):
        normed = norm(x, f"{layer}.norm1")
        q, k, v = (
            linear(normed, f"{layer}.attention.attention.{name}").unflatten(-1, (2, 12)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        attended = ((q @ k.transpose(-1, -2)) / 12**0.5).softmax(-1) @ v
        attended = linear(attended.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x = x + attended * w[f"{layer}.layer_scale1.lambda1"]
        hidden = functional.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1"))
        x = x + linear(hidden, f"{layer}.mlp.fc2") * w[f"{layer}.layer_scale2.lambda1"]
    return norm(x, "layernorm")[:, 1 + registers.shape[1] :]


def test_tokens_are_those_of_the_equations(dinov2):
    encoder = DinoV2(str(dinov2))
    assert encoder.feature_size == 24
    weights = load_file(dinov2 / "model.safetensors")
    # 3 x 3 patches are those of the position embeddings; the others need them resized, whatever came before.
    for size, grid in ((64, 4), (32, 2), (48, 3), (64, 4)):
        images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
        tokens = encoder(images)
        assert encoder.grid(size) == grid
        assert (tokens.shape, tokens.dtype, tokens.requires_grad) == ((2, grid**2, 24), torch.float32, False)
        assert relative_error(tokens, expected_tokens(weights, images)) < 1e-5
    narrow = DinoV2(str(dinov2), dtype=torch.bfloat16)(images)
    assert narrow.dtype == torch.bfloat16
    assert relative_error(narrow.float(), tokens) < 0.03


def test_the_checksum_is_of_the_weights_alone(dinov2, tmp_path):
    encoder = DinoV2(str(dinov2))
    before = encoder.sha256()
    encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert encoder.sha256() == before
    weights = load_file(dinov2 / "model.safetensors")
    (tmp_path / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
    weights["layernorm.bias"][3] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert DinoV2(str(tmp_path)).sha256() != before


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 3, 40, 40), torch.uint8, "image size is 40; allowed: multiples of 16"),
        ((1, 3, 64, 48), torch.uint8, r"expected torch.uint8 \(B, 3, S, S\)"),
        ((1, 3, 64, 64), torch.float32, r"images are torch.float32"),
    ],
)
def test_other_images_are_refused(dinov2, shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        DinoV2(str(dinov2))(torch.zeros(shape, dtype=dtype))


def test_folders_without_a_dinov2_are_refused(dinov2, tmp_path):
    transformers = pytest.importorskip("transformers")

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            DinoV2(str(tmp_path))
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)

    refused("could not be loaded: .*; expected a local folder or hub id such as facebook/dinov2-base")
    transformers.ViTConfig().save_pretrained(tmp_path)
    refused("is a vit; expected a DINOv2")
    (tmp_path / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
    refused("could not be loaded")
    weights = load_file(dinov2 / "model.safetensors")
    lacking = {name: weight for name, weight in weights.items() if not name.startswith("encoder.layer.1.mlp")}
    save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
    refused(r"lacks 4 of its weights, such as encoder\.layer\.1\.mlp\.fc1\.bias")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    refused(r"could not be loaded: model\.safetensors: it is truncated or not safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(r"could not be loaded: model\.safetensors: it is empty; expected a local folder")


def test_a_missing_transformers_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'DINOv2 needs transformers, pip install "\.\[repa\]" in the checkout'):
        DinoV2()
