"""Models of the Hugging Face Hub without a network: from its cache at once, or one line after one attempt."""

import os
import subprocess
import sys

import pytest
from diffusers import AutoencoderKL

from ddt_fast import hub

# One process, where nobody answers at the Hub's address: huggingface_hub reads that when it is imported.
SCRIPT = """
import torch
from ddt_fast import load_model
from ddt_fast.autoencoder import Decoder
from ddt_fast.dinov2 import DinoV2

print(Decoder("some/vae", torch.device("cpu")).vae.config.block_out_channels)
for load in (lambda: Decoder("no/vae", torch.device("cpu")), lambda: DinoV2("no/dino"), lambda: load_model("no/model")):
    try:
        load()
    except Exception as error:
        print(" ".join(str(error).split()))
"""


@pytest.mark.slow
def test_without_a_network(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = tmp_path / "models--some--vae"
    snapshot = model / "snapshots" / ("0123456789" * 4)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).save_pretrained(snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert "Retrying" not in result.stderr
    cached, autoencoder, dino, checkpoint = result.stdout.splitlines()
    assert "8" in cached
    unanswered = "http://127.0.0.1:9 does not answer, and its cache on this machine does not hold"
    for line, named in ((autoencoder, "autoencoder no/vae"), (dino, "DINOv2 no/dino")):
        assert named in line
        assert unanswered in line
    assert "no/model does not exist here, and the Hub does not provide it" in checkpoint


def test_where_the_hub_answers_nothing_is_kept_from_it(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    assert not hub.cache_only("some/vae-that-is-not-cached")
    monkeypatch.setattr(hub, "_hub_answers", lambda: pytest.fail("a folder was looked for at the Hub"))
    assert not hub.cache_only(str(tmp_path))
