"""Models of the Hugging Face Hub without a network: from its cache at once, or one line at once."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from diffusers import AutoencoderKL

from ddt_fast import hub


@pytest.fixture
def cache(tmp_path):
    """A cache of the Hub that holds some/vae."""
    snapshot = tmp_path / "cache" / "models--some--vae" / "snapshots" / ("0123456789" * 4)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).save_pretrained(snapshot)
    refs = tmp_path / "cache" / "models--some--vae" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    return tmp_path / "cache"


def without_a_network(cache: Path, code: str) -> subprocess.CompletedProcess:
    """Run code where nobody answers at the Hub's address."""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", "import torch\n" + textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_model_in_the_cache_needs_no_network(cache):
    code = """
        from ddt_fast.autoencoder import Decoder
        print(Decoder("some/vae", torch.device("cpu")).vae.config.block_out_channels)
    """
    result = without_a_network(cache, code)
    assert "8" in result.stdout, result.stderr
    assert "Retrying" not in result.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from ddt_fast.autoencoder import Decoder; Decoder('no/vae', torch.device('cpu'))", "autoencoder no/vae"),
        ("from ddt_fast.dinov2 import DinoV2; DinoV2('no/dino')", "DINOv2 no/dino"),
        ("from ddt_fast import load_model; load_model('no/model')", "checkpoint no/model is not a local path"),
    ],
    ids=["autoencoder", "dinov2", "checkpoint"],
)
def test_a_model_that_is_nowhere_is_one_error_after_one_attempt(cache, code, message):
    if "DinoV2" in code:
        pytest.importorskip("transformers", reason="transformers is not installed")
    result = without_a_network(cache, code)
    assert message in result.stderr.splitlines()[-1]
    assert "Retrying" not in result.stderr
    if "checkpoint" not in message:
        assert "http://127.0.0.1:9 does not answer, and its cache on this machine does not hold" in result.stderr


def test_where_the_hub_answers_nothing_is_kept_from_it(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    assert not hub.cache_only("some/vae-that-is-not-cached")
    monkeypatch.setattr(hub, "_hub_answers", lambda: pytest.fail("a folder was looked for at the Hub"))
    assert not hub.cache_only(str(tmp_path))
