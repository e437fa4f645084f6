"""float32 is float32, or TF32 on purpose, whichever of PyTorch's settings the caller has used."""

import multiprocessing

import pytest
import torch

from ddt_fast.device import float32_as
from ddt_fast.evaluation.inception import full_float32


def legacy():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True


def legacy_of_cuda():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


def everywhere():
    torch.backends.fp32_precision = "tf32"


def by_operation():
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "tf32"


def mixed():
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def now():
    backends = torch.backends
    parts = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    return [part.fp32_precision for part in parts] + [backends.cudnn.deterministic]


def check(settings):
    settings()
    before = now()
    with full_float32():
        assert now() == ["ieee"] * 4 + [True]
        with float32_as("tf32"):
            assert now() == ["tf32"] * 2 + ["ieee"] * 2 + [True]
        assert now() == ["ieee"] * 4 + [True]
    assert now() == before


@pytest.mark.parametrize("settings", [legacy, legacy_of_cuda, everywhere, by_operation, mixed])
def test_the_precision_is_ours_inside_and_the_callers_again_outside(settings):
    """In a process of its own: some of these settings cannot be taken back."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(check, (settings,))


def test_nothing_has_to_be_set_before():
    check(lambda: None)
