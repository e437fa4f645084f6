"""`python -m ddt_kernels.aot`: compile every kernel, in every shipped configuration, for every architecture.

Needs no GPU. Prints one row per binary and exits with 1 if any fails to compile, spills registers, exceeds its chip's
shared memory, is a GEMM or attention without its chip's tensor-core instruction, draws an advisory of lost performance
from ptxas, has become a special case because an argument is 1, or waits more than its budget allows.

The columns: kernel, configuration, architecture, registers per thread, stack bytes per thread, shared-memory bytes, the
tensor-core instruction found, whether bulk copies move tiles, programs that fit on an SM, waves of the grid over the
chip; then, for the kernels with a budget on sm_90, what their main loop waits for (serial round trips to memory,
barriers, drains of the tensor cores, and asynchronous copies before the first multiplication) and the bytes per ns that
an SM then moves; and the verdict. Exit code 2: nothing to compile, or no way to compile.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ddt_kernels
from ddt_kernels.compilation import ARCHITECTURES, AotCase, Compiled, compile_case

HEADER = (
    *("kernel", "configuration", "arch", "regs", "stack", "shared", "tensor core", "bulk", "per SM", "waves"),
    *("phases", "barriers", "copies", "drains", "B/ns", "verdict"),
)
README_COLUMNS = (
    *("kernel", "configuration", "regs", "shared", "per SM", "waves", "phases", "barriers", "copies", "drains"),
    *("B/ns", "verdict"),
)
CHANGED = {"regs": "registers", "per SM": "per_sm"} | {
    name: name for name in ("phases", "barriers", "copies", "drains")
}
CHANGED_COLUMNS = ("kernel", "configuration", *CHANGED, "B/ns", "advisories")


def op_modules() -> list[str]:
    """The package's modules that define aot_cases()."""
    names = [f"ddt_kernels.{info.name}" for info in pkgutil.iter_modules(ddt_kernels.__path__)]
    return [name for name in names if name != __spec__.name and hasattr(importlib.import_module(name), "aot_cases")]


def module_cases(module: str) -> list[AotCase]:
    """The cases the module ships."""
    cases: list[AotCase] = importlib.import_module(module).aot_cases()
    return cases


def compile_task(task: tuple[str, int, int, str]) -> list[Compiled]:
    """Compiles a module's case, given by its number, for an architecture: the kernels whose names contain a string.

    Cases hold closures, which cannot cross a process boundary, so workers look them up again.
    """
    module, index, arch, kernel = task
    return compile_case(module_cases(module)[index], arch, kernel)


def compile_all(modules: Sequence[str], archs: Sequence[int], jobs: int, kernel: str = "") -> list[Compiled]:
    """Every case of every module for every architecture it ships for, in that order; `kernel` as in compile_case."""
    cases = [(module, index, case) for module in modules for index, case in enumerate(module_cases(module))]
    tasks = [(module, index, arch, kernel) for module, index, case in cases for arch in archs if arch in case.archs]
    if jobs == 1:
        results = [compile_task(task) for task in tasks]
    else:
        # Forked: a worker has imported what this process has, which compiles nothing itself.
        with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
            results = list(pool.map(compile_task, tasks))
    return [row for rows in results for row in rows]


def table(rows: Sequence[Compiled]) -> str:
    """The rows under HEADER, columns aligned."""
    cells = [HEADER, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER) - 1)]
    return "\n".join("  ".join([*map(str.ljust, line, widths), line[-1]]) for line in cells)


def _cells(row: Compiled) -> tuple[str, ...]:
    waits = ["-"] * 4
    if row.waits is not None:
        waits = [str(row.waits.phases), str(row.waits.barriers), str(row.waits.copies), str(row.waits.drains)]
    return (
        *(row.kernel, row.configuration, f"sm_{row.arch}", str(row.registers), str(row.stack), str(row.shared)),
        *(row.tensor_core, "yes" if row.bulk_copies else "-", str(row.per_sm), f"{row.waves:.2f}", *waits),
        *("-" if row.bandwidth is None else f"{row.bandwidth:.1f}", "; ".join(row.problems) or "ok"),
    )


def write_readme(page: Path, rows: Sequence[Compiled], triton_version: str) -> None:
    """Puts two tables between the page's markers: of the kernels with a budget, and of what has changed since the
    commit in before.json, beside the page."""
    columns = [HEADER.index(name) for name in README_COLUMNS]
    budgeted = [[cells[column] for column in columns] for cells in (_cells(row) for row in rows if row.waits)]
    before = json.loads((page.parent / "before.json").read_text(encoding="utf-8"))
    default = {(row.kernel, row.configuration.partition(" [")[0]): row for row in rows if row.waits}  # the last tile
    changed = [_changed(row, default.get((row["kernel"], row["configuration"]))) for row in before["rows"]]
    content = page.read_text(encoding="utf-8")
    for name, title, table in (
        ("binaries", f"With triton {triton_version}, for sm_90:", _markdown(README_COLUMNS, budgeted)),
        ("before", f"Since commit {before['commit']}:", _markdown(CHANGED_COLUMNS, changed)),
    ):
        block = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
        content = block.sub(f"{title}\n\n{table}\n", content, count=1)
    page.write_text(content, encoding="utf-8")


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def _changed(before: dict[str, Any], row: Compiled | None) -> list[str]:
    """What a launch's default binary was, and what it is; "gone" if it is launched no longer."""
    cells = dict(zip(HEADER, _cells(row), strict=True)) if row is not None else {}
    old = {name: str(before[key]) for name, key in CHANGED.items()}
    old["B/ns"] = "-" if before["bandwidth"] is None else f"{before['bandwidth']:.1f}"
    old["advisories"] = ", ".join(before["advisories"]) or "-"
    new = cells | {"advisories": "-"} if cells else {}  # one that has any must not ship
    pairs = [(value, new.get(name, "gone")) for name, value in old.items()]
    return [before["kernel"], before["configuration"], *(a if a == b else f"{a} → {b}" for a, b in pairs)]


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles what the arguments select, prints the table, returns the exit code."""
    summary, details = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(prog="python -m ddt_kernels.aot", description=summary, epilog=details)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--arch", type=int, choices=ARCHITECTURES, action="append", help="repeat for several; default: all"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes; default: one per core"
    )
    parser.add_argument(
        "--module", action="append", help="take aot_cases() from these modules instead of the package's"
    )
    parser.add_argument("--readme", type=Path, help="the page whose table of binaries this rewrites")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; expected at least 1")
    try:
        import triton
    except ImportError:
        print("triton is not installed: pip install triton", file=sys.stderr)
        return 2
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so this process cannot compile: unset it", file=sys.stderr)
        return 2

    modules = options.module or op_modules()
    rows = compile_all(modules, options.arch or ARCHITECTURES, options.jobs, options.kernel)
    if not rows:
        print(f"nothing to compile in {', '.join(modules)}", file=sys.stderr)
        return 2
    failures = sum(bool(row.problems) for row in rows)
    print(table(rows))
    if options.readme is not None:
        write_readme(options.readme, rows, triton.__version__)
    print(f"{len(rows)} binaries, {failures} must not ship")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
