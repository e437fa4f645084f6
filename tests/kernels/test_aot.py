"""`python -m ddt_kernels.aot`: green on what ships, red on what must not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddt_kernels.aot import main
from kernel_testing import COMPILES

KERNELS = Path(__file__).parents[2] / "kernels"
RED = ("--module", "red_aot_cases", "--arch", "90", "--jobs", "1")


def verdicts(output):
    """{configuration: (registers, stack, shared, tensor core, bulk, verdict)}"""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in output.splitlines()]
    return {line[1]: line[3:] for line in lines[1:] if len(line) == 9}


@COMPILES
def test_shipped_forward_kernels_are_green_and_exchange_nothing(capsys):
    code = main(["--kernel", "norm_modulate_forward", "--arch", "90", "--jobs", "1"])
    output = capsys.readouterr().out
    assert code == 0, output
    rows = verdicts(output)
    assert {row[-1] for row in rows.values()} == {"ok"}
    shared = {name: row[2] for name, row in rows.items() if "C 1152 bfloat16" in name}
    assert len(shared) == 8 + 6  # without and with a forecast
    assert set(shared.values()) == {"0"}  # a warp owns its row: no shared memory, hence no barrier


@COMPILES
def test_what_must_not_ship_is_red_and_the_reason_is_named(capsys):
    assert main(RED) == 1
    output = capsys.readouterr().out
    assert "7 binaries, 6 must not ship" in output
    rows = verdicts(output)
    for configuration, verdict in (
        ("spills", "spills: "),
        ("too big", "shared memory above 232448"),
        ("no mma", "no wgmma"),
        ("no bulk copy", "no cp.async.bulk.tensor"),
        ("invalid", "does not compile: "),
        ("nothing", "launches no kernel"),
        ("good", "ok"),
    ):
        assert rows[configuration][-1].startswith(verdict)
    assert int(rows["spills"][1]) > 0
    assert rows["too big"][3] == "wgmma"
    assert rows["good"][1:5] == ["0", "0", "-", "-"]


@COMPILES
def test_nothing_to_compile_is_an_error(capsys):
    assert main([*RED, "--kernel", "no such kernel"]) == 1  # the case that launches nothing stays red regardless
    assert main(["--kernel", "no such kernel", "--jobs", "1"]) == 2
    assert "nothing to compile" in capsys.readouterr().err


def test_jobs_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        main(["--jobs", "0"])
    assert "--jobs is 0; expected at least 1" in capsys.readouterr().err


def test_the_interpreter_cannot_compile():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(KERNELS)}
    command = [sys.executable, "-m", "ddt_kernels.aot"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
