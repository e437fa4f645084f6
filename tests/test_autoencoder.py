"""Loading the autoencoder: what is not all there is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddt_fast.autoencoder import load_vae
from sample_jobs import small_autoencoder

DEPRECATED = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def load(folder):
    return load_vae(str(folder), torch.device("cpu"), torch.float32)


def renamed(name):
    for new, old in DEPRECATED.items():
        name = name.replace(new, old)
    return name


def test_the_names_of_older_diffusers_are_read_and_missing_tensors_refused(tmp_path):
    small_autoencoder(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    latents, weights = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), load_file(file)
    expected = load(tmp_path).decode(latents).sample
    save_file({renamed(name): tensor for name, tensor in weights.items()}, file)
    assert torch.equal(load(tmp_path).decode(latents).sample, expected)
    del weights["decoder.conv_in.weight"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"1 of its tensors are missing, such as decoder\.conv_in\.weight; expected"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
        (b"damaged", "it is truncated or not safetensors"),
    ],
)
def test_damaged_weights_are_named(tmp_path, content, message):
    small_autoencoder(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(content)
    refusal = (
        rf"autoencoder .* could not be loaded: .*diffusion_pytorch_model\.safetensors: {message}.*; expected the local"
    )
    with pytest.raises(ValueError, match=refusal):
        load(tmp_path)
