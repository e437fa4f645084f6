"""`python -m ddt_kernels.aot`: green on what ships, red on what must not."""

import pytest

from ddt_kernels import norm_launch, qk_norm_rope_launch
from ddt_kernels.aot import main
from ddt_kernels.compilation import compile_case
from kernel_testing import COMPILES

RED = ("--module", "red_aot_cases", "--arch", "90", "--jobs", "1")


def verdicts(output):
    """{configuration: (registers, stack, shared, tensor core, bulk, verdict)}"""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in output.splitlines()]
    return {line[1]: line[3:] for line in lines[1:] if len(line) == 9}


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "part", "kernel", "count"),
    [
        (norm_launch.aot_cases, "C 1152 bfloat16", "norm_modulate_forward", 8 + 6),  # without and with a forecast
        (qk_norm_rope_launch.aot_cases, "H ", "qk_norm_rope_forward", 5),
    ],
)
def test_forward_kernels_of_norms_exchange_nothing(cases, part, kernel, count):
    """A warp owns its row: no bytes of shared memory, hence no barrier."""
    selected = [case for case in cases() if part in case.configuration and not case.configuration.startswith("B ")]
    rows = [row for case in selected for row in compile_case(case, 90, kernel)]
    assert len(rows) == count
    assert {(row.problems, row.shared) for row in rows} == {((), 0)}


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


def test_the_interpreter_cannot_compile(monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
