"""Compiles kernels for GPUs this machine does not have, and reads the binaries.

An op's file declares what it ships in a function `aot_cases()` that returns `AotCase`s. A case calls one of the file's
own launchers on meta tensors; every kernel the launcher could have launched is compiled instead, with exactly the
arguments, specialisations and options of the real launch, once per architecture and candidate configuration: on meta
tensors, `tuning.choose` runs them all.
"""

import inspect
import io
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from ddt_kernels.runtime import cdiv, recorded_grid, recording
from ddt_kernels.sass import Waits, disassemble, waits

SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use: A100, H100/H200, B200
TENSOR_CORE_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}  # as PTX spells them
BULK_COPY_INSTRUCTION = "cp.async.bulk.tensor"
ARCHITECTURES = tuple(SHARED_MEMORY_LIMIT)
SMS = {80: 108, 90: 132, 100: 148}
SHARED_MEMORY_PER_SM = {80: 167_936, 90: 233_472, 100: 233_472}  # bytes; a block takes 1024 more than it asks for
REGISTERS_PER_SM, WARPS_PER_SM, BLOCKS_PER_SM = 65_536, 64, 32
ROUND_TRIP, BARRIER = 700, 35  # ns on sm_90: a load from memory under load, a barrier of a few warps
BANDWIDTH_PER_SM = 32.6  # bytes per ns: 4.3 TB/s, an H200's copy, over 132 SMs


@dataclass(frozen=True)
class Budget:
    """What a kernel may wait for on sm_90, at most: `sass.Waits` has the meanings.

    bytes: device-memory traffic of one turn of the loop (a row, mostly), 0 where it is not what bounds the kernel.
        Programs that wait for `phases` round trips and `barriers` then have to reach the SM's bandwidth.
    latency_bound: why they may miss it.
    """

    phases: int = 0
    barriers: int = 0
    copies: int = 0
    drains: int = 0
    bytes: int = 0
    latency_bound: str = ""


@dataclass(frozen=True)
class AotCase:
    """One shipped configuration.

    configuration: what distinguishes it from the file's other cases: shape, dtype, granularity. Rows add their tiles.
    run: calls a launcher on meta tensors (`device="meta"`); its result is ignored.
    tensor_cores: names of the launched kernels that must use the chip's tensor cores.
    bulk_copies: names of those that must copy whole tiles (cp.async.bulk.tensor); checked from sm_90 on.
    archs: the architectures it ships for.
    ones: integer arguments that are 1 in every launch like this. Triton makes a constant of a 1, and another kernel:
        any other argument that is 1 is a problem.
    budgets: by the launched kernel's name.
    """

    configuration: str
    run: Callable[[], object]
    tensor_cores: tuple[str, ...] = ()
    bulk_copies: tuple[str, ...] = ()
    archs: tuple[int, ...] = ARCHITECTURES
    ones: tuple[str, ...] = ()
    budgets: Mapping[str, Budget] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """One kernel binary, launched with the case's grid.

    registers: per thread; stack: bytes per thread, above 0 if it spills; shared: bytes per block; per_sm: programs that
    fit on an SM; waves: programs of the grid over those that all SMs hold; waits: on sm_90, of kernels with a budget;
    bandwidth: bytes per ns that an SM's programs reach by those waits, where the budget gives bytes; problems: why it
    must not ship, empty if it may.
    """

    kernel: str
    configuration: str
    arch: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_core: str = "-"
    bulk_copies: bool = False
    per_sm: int = 0
    waves: float = 0.0
    waits: Waits | None = None
    bandwidth: float | None = None
    problems: tuple[str, ...] = ()


class _StandInDriver:
    """Answers what Triton asks a driver before it compiles. The device id is the architecture, because a kernel's
    compiled variants are cached per device id."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def set_current_device(self, device: int) -> None:
        assert device == self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "meta"


@contextmanager
def compiling_for(arch: int) -> Iterator[None]:
    """Inside, launchers on meta tensors see a GPU of this architecture."""
    from triton.runtime import driver

    previous = driver._active  # `driver.active` would look for a GPU, and fail without one
    driver.set_active(_StandInDriver(arch))
    try:
        yield
    finally:
        driver.set_active(previous)


@contextmanager
def launching_into(receive: Callable[[Any], Callable[..., None]], arch: int = 90) -> Iterator[None]:
    """Inside, launchers on CPU tensors go all the way to the driver, for a GPU of this architecture.

    receive: gives what stands for a binary on the GPU. It takes what triton hands to the driver: three grid sizes,
    stream, function, packed metadata, launch metadata, two hooks, and the kernel's arguments.
    """
    from triton.compiler.compiler import CompiledKernel

    def load(binary: Any) -> None:
        binary._run, binary.function, binary.module = receive(binary), 0, None

    original, CompiledKernel._init_handles = CompiledKernel._init_handles, load
    try:
        with compiling_for(arch):
            yield
    finally:
        CompiledKernel._init_handles = original


def _tile(meta: dict[str, Any]) -> str:
    """What distinguishes candidates: block sizes (constexprs BLOCK…, BM and BN), warps, stages."""
    blocks = [str(value) for name, value in meta.items() if name.startswith("BLOCK") or name in ("BM", "BN")]
    if not blocks:
        return ""
    stages = f", {meta['num_stages']} stages" if "num_stages" in meta else ""
    return f" [{'x'.join(blocks)}, {meta['num_warps']} warps{stages}]"


def compile_case(case: AotCase, arch: int, only: str = "") -> list[Compiled]:
    """Compiles for `arch` every kernel the case launches whose name contains `only`.

    A compiler error becomes a row with a problem, not an exception; so does a case that launches nothing.
    """
    rows: list[Compiled] = []
    launched = []

    def compile_instead(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        name, configuration = kernel.__name__, case.configuration + _tile(meta)
        launched.append(name)
        if only not in name:
            return
        try:
            binary, advisories = _compile(kernel, args, meta, arch)
        except Exception as error:
            problem = f"does not compile: {type(error).__name__}: {error}"
            rows.append(Compiled(name, configuration, arch, problems=(problem,)))
        else:
            constants = [f"{argument} is a constant 1" for argument in _ones(kernel, args) if argument not in case.ones]
            programs = math.prod(recorded_grid())
            rows.append(_inspect(binary, name, configuration, case, arch, programs, constants + advisories))

    with compiling_for(arch), recording(compile_instead):
        case.run()
    if not launched:
        rows.append(Compiled("-", case.configuration, arch, problems=("launches no kernel",)))
    return rows


def _compile(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], arch: int) -> tuple[Any, list[str]]:
    """The binary, and ptxas's advisories of lost performance (C75xx: wgmma is serialised)."""
    from triton import knobs

    kernel.device_caches.pop(arch, None)  # a binary known already would come without ptxas's report
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as report:
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.disable_line_info = True  # the same instructions, compiled sooner
        binary = kernel.warmup(*args, grid=(1,), **meta)
    return binary, [f"ptxas advisory {code}" for code in sorted(set(re.findall(r"\b(C75\d\d)\b", report.getvalue())))]


def _ones(kernel: Any, args: tuple[Any, ...]) -> list[str]:
    """The kernel's integer arguments that are 1."""
    names = inspect.signature(kernel.fn).parameters
    return [name for name, value in zip(names, args, strict=False) if type(value) is int and value == 1]


def programs_per_sm(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """How many fit, by registers (given to warps in units of 8 per thread, on a quarter of the SM each), shared memory
    and the limits on warps and blocks."""
    per_warp = 32 * 8 * cdiv(registers, 8)
    warps = min(WARPS_PER_SM, 4 * (REGISTERS_PER_SM // 4 // per_warp))
    return min(BLOCKS_PER_SM, warps // num_warps, SHARED_MEMORY_PER_SM[arch] // (shared + 1024))


def _inspect(
    binary: Any, name: str, configuration: str, case: AotCase, arch: int, programs: int, problems: list[str]
) -> Compiled:
    ptx, cubin, shared = binary.asm["ptx"], binary.asm["cubin"], binary.metadata.shared
    registers, stack = resource_usage(cubin)
    found = [instruction for instruction in TENSOR_CORE_INSTRUCTION.values() if instruction in ptx]
    bulk_copies = BULK_COPY_INSTRUCTION in ptx
    if stack > 0:
        problems.append(f"spills: {stack} bytes of stack")
    if shared > SHARED_MEMORY_LIMIT[arch]:
        problems.append(f"shared memory above {SHARED_MEMORY_LIMIT[arch]}")
    if name in case.tensor_cores and TENSOR_CORE_INSTRUCTION[arch] not in found:
        problems.append(f"no {TENSOR_CORE_INSTRUCTION[arch]}")
    if name in case.bulk_copies and arch >= 90 and not bulk_copies:
        problems.append(f"no {BULK_COPY_INSTRUCTION}")
    per_sm = programs_per_sm(arch, registers, shared, binary.metadata.num_warps)
    seen = bandwidth = None
    if arch == 90 and name in case.budgets:
        seen, budget = waits(disassemble(cubin)), case.budgets[name]
        problems += over_budget(seen, budget)
        if budget.bytes:
            round_trips = max(seen.phases, 1)  # a row that was copied ahead took one too
            bandwidth = budget.bytes * per_sm / (round_trips * ROUND_TRIP + seen.barriers * BARRIER)
            if bandwidth < BANDWIDTH_PER_SM and not budget.latency_bound:
                problems.append(f"{bandwidth:.1f} bytes per ns and SM, below {BANDWIDTH_PER_SM}")
    return Compiled(
        *(name, configuration, arch, registers, stack, shared, "+".join(found) or "-", bulk_copies, per_sm),
        *(programs / (per_sm * SMS[arch]) if per_sm else 0.0, seen, bandwidth, tuple(problems)),
    )


def over_budget(seen: Waits, budget: Budget) -> list[str]:
    """What the kernel waits for more often than it may."""
    counts = [(name, getattr(seen, name), getattr(budget, name)) for name in ("phases", "barriers", "copies", "drains")]
    return [f"{count} {name}, budget {limit}" for name, count, limit in counts if count > limit]


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, stack bytes per thread) of the one kernel in a cubin, read by Triton's cuobjdump."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(item.split(":")[:2] for line in report.splitlines() for item in line.split() if "REG:" in line)
    return int(usage["REG"]), int(usage["STACK"])
