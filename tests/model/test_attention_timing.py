"""`python -m ddt_fast.model.attention`: what is wrong or missing gets no time; on a GPU all there is is right."""

import sys

import pytest
import torch

from ddt_fast.model import attention as backends
from ddt_fast.model.attention import resolve_backend
from ddt_fast.model.attention.__main__ import main, measure

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_measuring_times_what_is_right_and_nothing_else(monkeypatch):
    right = backends._RUN["sdpa_math"]
    results = measure(CPU, torch.float32, (1, 16, 2, 12), rounds=3)
    assert {name for name, r in results.items() if r.forward and r.with_backward} == {"sdpa_flash", "sdpa_math"}
    assert all(r.error < 1e-6 for r in results.values() if r.forward)
    assert results["triton"].reason.startswith("missing: needs an NVIDIA GPU")
    monkeypatch.setitem(backends._RUN, "sdpa_flash", lambda q, k, v: right(q, k, v) * 1.001)
    assert measure(CPU, torch.float32, (1, 16, 2, 12), rounds=1)["sdpa_flash"].reason.startswith("wrong: ")
    monkeypatch.setitem(backends._RUN, "sdpa_flash", lambda q, k, v: right(q.detach(), k, v))  # no gradient of q
    assert measure(CPU, torch.float32, (1, 16, 2, 12), rounds=1)["sdpa_flash"].forward is None

    def failing(q, k, v):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(backends._RUN, "sdpa_flash", failing)
    reason = measure(CPU, torch.float32, (1, 16, 2, 12), rounds=1)["sdpa_flash"].reason
    assert reason == "failed: RuntimeError: no kernel image is available"


def test_the_command_prints_a_table(monkeypatch, capsys):
    arguments = ["--device", "cpu", "--dtypes", "[float32]", "--shapes", "[[1,8,2,8]]", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["attention", *arguments])
    main()
    out = capsys.readouterr().out
    assert "float32, B, N, H, D = 1, 8, 2, 8" in out
    flash, math = (
        next(line for line in out.splitlines() if f"| {name} |" in line) for name in ("sdpa_flash", "sdpa_math")
    )
    assert [cell.endswith("(auto) ") for cell in flash.split("|")] == [False, False, False, True, *[False] * 4]
    assert [cell.endswith("(auto) ") for cell in math.split("|")] == [*[False] * 5, True, False, False]
    assert "\n- flash_attn_4 missing: needs an NVIDIA GPU" in out
    monkeypatch.setattr(sys, "argv", ["attention", "--device", "cpu", "--dtypes", "[float8]"])
    with pytest.raises(ValueError, match="--dtypes has 'float8'; allowed: float32, bfloat16, float16"):
        main()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 256, 16, 72), (2, 200, 4, 64), (1, 65, 2, 128)])
def test_every_backend_there_is_on_cuda_is_right(shape, dtype):
    results = measure(CUDA, dtype, shape, rounds=1)
    assert results[resolve_backend("auto", CUDA, dtype, shape[-1], shape[1])].forward is not None
    failed = {name: r.reason for name, r in results.items() if r.reason and not r.reason.startswith("missing: ")}
    assert not failed
