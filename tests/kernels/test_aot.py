"""`python -m ddt_kernels.aot`: green on what ships, red on what must not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS, HERE = Path(__file__).parents[2] / "kernels", Path(__file__).parent


def aot(*arguments, **environment):
    """Runs the command in a process of its own: whether it can compile depends on the environment at import."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(KERNELS), str(HERE)])
    command = [sys.executable, "-m", "ddt_kernels.aot", "--jobs", "1", *arguments]
    return subprocess.run(
        command, env={**inherited, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=False
    )


def verdicts(result):
    """{configuration: (registers, stack, shared, tensor core, bulk, verdict)}"""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.stdout.splitlines()]
    return {line[1]: line[3:] for line in lines[1:] if len(line) == 9}


@pytest.fixture(scope="module")
def red():
    return aot("--module", "red_aot_cases", "--arch", "90")


def test_shipped_forward_kernels_are_green_and_exchange_nothing():
    result = aot("--kernel", "norm_modulate_forward", "--arch", "90")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = verdicts(result)
    assert {row[-1] for row in rows.values()} == {"ok"}
    shared = {name: row[2] for name, row in rows.items() if "C 1152 bfloat16" in name}
    assert len(shared) == 8 + 6  # without and with a forecast
    assert set(shared.values()) == {"0"}  # a warp owns its row: no shared memory, hence no barrier


def test_what_must_not_ship_is_red(red):
    assert red.returncode == 1, red.stderr
    assert "7 binaries, 6 must not ship" in red.stdout


@pytest.mark.parametrize(
    ("configuration", "verdict"),
    [
        ("spills", "spills: "),
        ("too big", "shared memory above 232448"),
        ("no mma", "no wgmma"),
        ("no bulk copy", "no cp.async.bulk.tensor"),
        ("invalid", "does not compile: "),
        ("nothing", "launches no kernel"),
        ("good", "ok"),
    ],
)
def test_the_reason_is_named(red, configuration, verdict):
    assert verdicts(red)[configuration][-1].startswith(verdict)


def test_spills_and_tensor_cores_are_read_off_the_binary(red):
    rows = verdicts(red)
    assert int(rows["spills"][1]) > 0
    assert rows["too big"][3] == "wgmma"
    assert rows["good"][1:5] == ["0", "0", "-", "-"]


def test_nothing_to_compile_is_an_error():
    result = aot("--module", "red_aot_cases", "--kernel", "no such kernel", "--arch", "90")
    assert result.returncode == 1  # the case that launches nothing stays red whatever is selected
    assert aot("--kernel", "no such kernel").returncode == 2


def test_the_interpreter_cannot_compile():
    result = aot(TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
