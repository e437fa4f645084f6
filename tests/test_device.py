"""float32 is float32, or TF32 on purpose, whichever of PyTorch's settings the caller has used."""

import subprocess
import sys

import pytest

# In processes of their own: some of PyTorch's settings cannot be taken back.
SETTINGS = {
    "none": "",
    "legacy": "torch.set_float32_matmul_precision('medium'); torch.backends.cudnn.allow_tf32 = True",
    "legacy, the other way": "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = False",
    "everywhere": "torch.backends.fp32_precision = 'tf32'",
    "by operation": "torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = 'tf32'",
    "mixed": "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
}
CODE = """
import torch
{settings}
from ddt_fast.device import float32_as
from ddt_fast.evaluation.inception import full_float32

def now():
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn
    parts = cuda, torch.backends.cudnn.conv, cpu.matmul, cpu.conv
    return [part.fp32_precision for part in parts] + [torch.backends.cudnn.deterministic]

before = now()
with full_float32():
    assert now() == ["ieee"] * 4 + [True], now()
    with float32_as("tf32"):
        assert now() == ["tf32"] * 2 + ["ieee"] * 2 + [True], now()
    assert now() == ["ieee"] * 4 + [True], now()
assert now() == before, (now(), before)
"""


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_precision_is_ours_inside_and_the_callers_again_outside(settings):
    code = CODE.format(settings=settings)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
