"""The package as a whole: it imports without triton, and no kernel uses atomics."""

import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, ddt_kernels
from ddt_kernels.norm_launch import launch_forward
x, weight, shift = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8), torch.zeros(2, 1, 8)
y = ddt_kernels.rms_norm_modulate(x, weight, shift, shift)
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
y.square().mean().backward()
assert x.grad.isfinite().all()
try:
    launch_forward(x, None, None, weight, shift, shift, 1e-6, "rms", False)
except RuntimeError as error:
    assert "norm_modulate_forward_kernel is a Triton kernel and triton is not installed" in str(error)
else:
    raise AssertionError("launched without triton")
print("done")
"""


def test_without_triton_the_package_imports_and_its_cpu_kernels_run():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=KERNELS, capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr


@pytest.mark.parametrize("source", sorted((KERNELS / "ddt_kernels").glob("*.py")), ids=lambda path: path.name)
def test_no_kernel_uses_atomics(source):
    """Sums over programs have a fixed order: that is why gradients repeat, which a serial interpreter cannot show."""
    assert "tl.atomic" not in source.read_text()
