"""Loading the autoencoder: what is not all there is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddt_fast.autoencoder import load_vae
from sample_jobs import small_autoencoder

DEPRECATED = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def load(folder):
    return load_vae(str(folder), torch.device("cpu"), torch.float32)


@pytest.fixture
def rewritten(tmp_path):
    """A small autoencoder whose weights can be written anew, as what a function makes of them."""
    folder = tmp_path / "vae"
    small_autoencoder(folder)
    file = folder / "diffusion_pytorch_model.safetensors"

    def rewrite(change):
        save_file(change(load_file(file)), file)
        return folder

    return rewrite


def test_missing_tensors_are_refused(rewritten):
    folder = rewritten(lambda weights: {n: t for n, t in weights.items() if n != "decoder.conv_in.weight"})
    with pytest.raises(ValueError, match=r"1 of its tensors are missing, such as decoder\.conv_in\.weight; expected"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"diffusion_pytorch_model\.safetensors: it is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            r"diffusion_pytorch_model\.safetensors: it is a Git LFS pointer",
        ),
        (b"damaged", r"diffusion_pytorch_model\.safetensors: it is truncated or not safetensors"),
    ],
)
def test_damaged_weights_are_named(rewritten, content, message):
    folder = rewritten(lambda weights: weights)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"autoencoder .*/vae could not be loaded: {message}.*; expected the local"):
        load(folder)


def test_the_names_of_older_diffusers_are_read(rewritten):
    def rename(name):
        for new, old in DEPRECATED.items():
            name = name.replace(new, old)
        return name

    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = load(rewritten(lambda weights: weights)).decode(latents).sample
    folder = rewritten(lambda weights: {rename(name): tensor for name, tensor in weights.items()})
    assert torch.equal(load(folder).decode(latents).sample, expected)
