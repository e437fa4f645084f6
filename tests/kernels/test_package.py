"""The package as shipped: README's examples and table, installed alone, without triton, without atomics."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ddt_kernels
from ddt_fast.config import DDTConfig
from ddt_fast.model.base import rotary_tables
from ddt_fast.model.reference import Block
from ddt_kernels import floors, runtime

KERNELS = Path(__file__).parents[2] / "kernels"
README = (KERNELS / "README.md").read_text(encoding="utf-8")


def example(number):
    """The `forward` of README's Python block of this number."""
    namespace = {}
    exec(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number], namespace)
    return namespace["forward"]


def assert_same_block(y, expected, parameters):
    """Equal, and so are the gradients of a random projection in all parameters."""
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape)
    made, expected_gradients = (torch.autograd.grad((output * weights).sum(), parameters) for output in (y, expected))
    torch.testing.assert_close(made, expected_gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 24], ids=["sample", "token"])
def test_the_first_example_is_a_ddt_block_forward_and_backward(tokens):
    torch.manual_seed(0)
    config = DDTConfig(4, 2, hidden_size=40, num_heads=2, num_blocks=2, num_encoder_blocks=1, num_classes=10)
    block = Block(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = SimpleNamespace(
        adaLN=block.adaLN_modulation,
        norm1=block.norm1,
        norm2=block.norm2,
        num_heads=config.num_heads,
        **{name: getattr(block.attn, name) for name in ("qkv", "q_norm", "k_norm", "proj")},
        **{name: getattr(block.mlp, name) for name in ("w1", "w2", "w3")},
    )
    cos, sin = rotary_tables(config.head_dim, 4, 6)
    x, c = torch.randn(2, 24, 40), torch.randn(2, tokens, 40)
    expected = block(x, block.adaLN_modulation(c), cos, sin)
    assert_same_block(example(0)(theirs, x, c, cos, sin), expected, list(block.parameters()))


class DiTBlock(nn.Module):
    """A DiT block (arXiv 2212.09748) in plain PyTorch, with its names."""

    def __init__(self, channels, heads):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.norm = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.attn.num_heads = heads
        hidden = 4 * channels
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU("tanh"), nn.Linear(hidden, channels))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        qkv = self.attn.qkv(self.norm(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.attn.num_heads, -1))
        heads = nn.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + gate1 * self.attn.proj(heads.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


def test_the_second_example_is_a_dit_block_forward_and_backward():
    torch.manual_seed(0)
    block, x, c = DiTBlock(40, 2), torch.randn(2, 24, 40), torch.randn(2, 40)
    assert_same_block(example(1)(block, x, c), block(x, c), list(block.parameters()))


def test_the_floors_are_what_the_command_prints():
    printed = floors.table()
    assert printed in README, "run: python -m ddt_kernels.floors, and put its table into kernels/README.md"


def test_every_public_op_has_a_floor_and_a_row():
    costs = {name.removesuffix("_cost") for name in ddt_kernels.__all__ if name.endswith("_cost")}
    with_floor = {name.removesuffix("_") for name, _, _ in floors.costs()}
    assert costs == with_floor
    for name in costs:
        assert re.search(rf"^\| `{name}\(", README, re.MULTILINE), name


@pytest.mark.slow
def test_the_folder_installs_as_a_package_of_its_own(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, site = tmp_path / "kernels", tmp_path / "site"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    installed = {path.relative_to(site) for path in site.glob("ddt_kernels/**/*") if path.suffix != ".pyc"}
    shipped = {path.relative_to(source) for path in source.glob("ddt_kernels/**/*")}
    assert {path for path in installed if path.name != "__pycache__"} == shipped
    assert Path("ddt_kernels/py.typed") in installed
    assert not (site / "ddt_fast").exists()
    (metadata,) = site.glob("ddt_kernels-*.dist-info/METADATA")
    required = re.findall(r"^Requires-Dist: (\w+)", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(required) == ["torch", "triton"]


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


@pytest.mark.slow
def test_without_triton_the_package_imports_and_its_cpu_kernels_run():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=KERNELS, capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr


@pytest.mark.parametrize("source", sorted((KERNELS / "ddt_kernels").glob("*.py")), ids=lambda path: path.name)
def test_no_kernel_uses_atomics(source):
    """Sums over programs have a fixed order: that is why gradients repeat, which a serial interpreter cannot show."""
    assert "tl.atomic" not in source.read_text()


def test_importing_leaves_out_torch_dynamo():
    """It takes as long to import as torch itself. `constant_result` does what PyTorch's own does without it."""
    code = "import sys, ddt_kernels, ddt_fast.sampling.engine; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0

    def ours(): ...

    def theirs(): ...

    assert vars(runtime.constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
