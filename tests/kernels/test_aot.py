"""`python -m ddt_kernels.aot`: green on what ships, red on what must not."""

import json

import pytest

from ddt_kernels import attention_launch, norm_launch, qk_norm_rope_launch, swiglu_launch
from ddt_kernels.aot import HEADER, main, write_readme
from ddt_kernels.compilation import Compiled, compile_case, programs_per_sm
from ddt_kernels.sass import Waits, waits
from kernel_testing import COMPILES

RED = ("--module", "red_aot_cases", "--arch", "90", "--jobs", "1")


def verdicts(output):
    """{configuration: (registers, stack, shared, tensor core, bulk, ..., verdict)}"""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in output.splitlines()]
    return {line[1]: line[3:] for line in lines[1:] if len(line) == len(HEADER)}


@COMPILES
def test_what_must_not_ship_is_red_and_the_reason_is_named(capsys):
    assert main(RED) == 1
    output = capsys.readouterr().out
    assert "13 binaries, 11 must not ship" in output
    rows = verdicts(output)
    for configuration, verdict in (
        ("spills", "spills: "),
        ("too big", "shared memory above 232448"),
        ("no mma", "no wgmma"),
        ("no bulk copy", "no cp.async.bulk.tensor"),
        ("phases", "2 phases, budget 1"),
        ("barriers", "1 barriers, budget 0"),
        ("slow", "5.7 bytes per ns and SM, below 32.6"),
        ("excused", "ok"),
        ("constant", "count is a constant 1"),
        ("serialised [128x64, 8 warps, 3 stages]", "ptxas advisory C7512"),
        ("invalid", "does not compile: "),
        ("nothing", "launches no kernel"),
        ("good", "ok"),
    ):
        assert rows[configuration][-1].startswith(verdict)
    assert int(rows["spills"][1]) > 0
    assert rows["too big"][3] == "wgmma"
    assert rows["good"][1:5] == ["0", "0", "-", "-"]


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize(
    ("cases", "configuration"),
    [
        (norm_launch.aot_cases, "gated rms C 1152 bfloat16 per token"),
        (qk_norm_rope_launch.aot_cases, "B 128 H 16 D 72 bfloat16"),
        (attention_launch.aot_cases, "D 72 bfloat16 N 1000"),
        (swiglu_launch.aot_cases, "M 16384 O 1152 F 3072 bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_chips_get_clean_binaries_of_the_heaviest_kernels(cases, configuration, arch):
    """The test command compiles everything for sm_90 alone; `python -m ddt_kernels.aot` does for all three."""
    rows = [row for case in cases() if case.configuration == configuration for row in compile_case(case, arch)]
    assert rows
    assert [row.problems for row in rows] == [()] * len(rows)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "expected"),
    [
        (90, 64, 0, 4, 8),  # registers
        (90, 72, 4096, 4, 7),
        (90, 124, 82008, 8, 2),
        (90, 179, 229408, 8, 1),  # shared memory
        (80, 58, 86056, 4, 1),
        (90, 58, 86056, 4, 2),
        (90, 16, 0, 4, 16),  # warps
        (90, 16, 0, 1, 32),  # blocks
        (90, 255, 0, 16, 0),  # fits nowhere
    ],
)
def test_programs_per_sm(arch, registers, shared, num_warps, expected):
    assert programs_per_sm(arch, registers, shared, num_warps) == expected


def listing(*lines):
    """As nvdisasm prints instructions and labels."""
    return "\n".join(line if line.endswith(":") else f"        /*{i:04x}*/   {line} ;" for i, line in enumerate(lines))


def test_the_main_loops_loads_and_barriers_are_counted():
    """Three loads, of which the second needs the first's result and the third comes after its use; the jump behind the
    end is no loop."""
    loop = (
        *(".L_x_0:", "LDG.E.128 R4, desc[UR4][R2.64]", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDG.E R8, desc[UR4][R6.64]"),
        *("LDG.E R10, desc[UR4][R12.64]", "@P0 BRA `(.L_x_0)"),
    )
    before = ("LDG.E R20, desc[UR4][R2.64]", "@!P0 EXIT", "BAR.SYNC.DEFER_BLOCKING 0x0")
    assert waits(listing(*before, *loop, "EXIT", "BRA `(.L_x_0)")) == Waits(phases=2, barriers=1)
    assert waits(listing(*before, "IADD3 R20, R20, R20, RZ", *loop[1:-1], "EXIT")) == Waits(phases=3, barriers=2)


def test_waits_for_copies_and_drains_are_counted():
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR32+0x4000], RZ"
    code = (
        *("@UP1 UTMALDG.4D [UR32], [UR14]", wait, wait, "@UP0 UTMALDG.4D [UR8], [UR16]", wait),
        *("LDGSTS.E [R2], desc[UR6][R8.64]", ".L_x_1:", "DEPBAR.LE SB0, 0x0", wait),
        *("HGMMA.64x64x16.F32.BF16 R24, R112, gdesc[UR16], RZ, !UPT", "WARPGROUP.DEPBAR.LE gsb0, 0x1", wait),
        *("WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P0 BRA `(.L_x_1)", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"),
    )
    assert waits(listing(*code)) == Waits(phases=0, barriers=0, copies=3, drains=1)


def test_the_readme_gets_the_rows_with_a_budget(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- binaries -->\nold\n<!-- end of binaries -->\n<!-- before -->\n<!-- end of before -->\nz\n")
    old = {"registers": 80, "per_sm": 6, "phases": 2, "barriers": 8, "copies": 0, "drains": 0}
    old |= {"bandwidth": 28.8, "advisories": ["C7512"]}
    before = [{"kernel": "a", "configuration": "of 1", **old}, {"kernel": "c", "configuration": "of 3", **old}]
    (tmp_path / "before.json").write_text(json.dumps({"commit": "c00814a", "rows": before}))
    rows = [
        Compiled("a", "of 1 [64x32, 4 warps]", 90, 70, per_sm=7, waits=Waits(2, 5), bandwidth=30.0),
        Compiled("a", "of 1 [64x64, 4 warps]", 90, 64, per_sm=8, waves=1.5, waits=Waits(2, 3), bandwidth=40.0),
        Compiled("b", "of 2", 90),
    ]
    write_readme(page, rows, "3.8.0")
    lines = [line for line in page.read_text().splitlines() if line]
    assert lines[:3] == ["a", "<!-- binaries -->", "With triton 3.8.0, for sm_90:"]
    assert [line for line in lines if line.startswith(("| a", "| b", "| c"))] == [
        "| a | of 1 [64x32, 4 warps] | 70 | 0 | 7 | 0.00 | 2 | 5 | 0 | 0 | 30.0 | ok |",
        "| a | of 1 [64x64, 4 warps] | 64 | 0 | 8 | 1.50 | 2 | 3 | 0 | 0 | 40.0 | ok |",
        "| a | of 1 | 80 → 64 | 6 → 8 | 2 | 8 → 3 | 0 | 0 | 28.8 → 40.0 | C7512 → - |",
        "| c | of 3 | 80 → gone | 6 → gone | 2 → gone | 8 → gone | 0 → gone | 0 → gone | 28.8 → gone | C7512 → gone |",
    ]
    assert lines[-2:] == ["<!-- end of before -->", "z"]


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
