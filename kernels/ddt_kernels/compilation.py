"""Compiles kernels for GPUs this machine does not have, and reads the binaries.

An op's file declares what it ships in a function `aot_cases()` that returns `AotCase`s. A case calls one of the file's
own launchers on meta tensors; every kernel the launcher could have launched is compiled instead, with exactly the
arguments, specialisations and options of the real launch, once per architecture and candidate configuration: on meta
tensors, `tuning.choose` runs them all.
"""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ddt_kernels.runtime import recording

SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use: A100, H100/H200, B200
TENSOR_CORE_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}  # as PTX spells them
BULK_COPY_INSTRUCTION = "cp.async.bulk.tensor"
ARCHITECTURES = tuple(SHARED_MEMORY_LIMIT)


@dataclass(frozen=True)
class AotCase:
    """One shipped configuration.

    configuration: what distinguishes it from the file's other cases: shape, dtype, granularity. Rows add their tiles.
    run: calls a launcher on meta tensors (`device="meta"`); its result is ignored.
    tensor_cores: names of the launched kernels that must use the chip's tensor cores.
    bulk_copies: names of those that must copy whole tiles (cp.async.bulk.tensor); checked from sm_90 on.
    archs: the architectures it ships for.
    """

    configuration: str
    run: Callable[[], object]
    tensor_cores: tuple[str, ...] = ()
    bulk_copies: tuple[str, ...] = ()
    archs: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Compiled:
    """One kernel binary.

    registers: per thread; stack: bytes per thread, above 0 if it spills; shared: bytes per block; problems: why it
    must not ship, empty if it may.
    """

    kernel: str
    configuration: str
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_core: str
    bulk_copies: bool
    problems: tuple[str, ...]


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
            binary = kernel.warmup(*args, grid=(1,), **meta)
        except Exception as error:
            problem = f"does not compile: {type(error).__name__}: {error}"
            rows.append(Compiled(name, configuration, arch, 0, 0, 0, "-", False, (problem,)))
        else:
            rows.append(_inspect(binary, name, configuration, case, arch))

    with compiling_for(arch), recording(compile_instead):
        case.run()
    if not launched:
        rows.append(Compiled("-", case.configuration, arch, 0, 0, 0, "-", False, ("launches no kernel",)))
    return rows


def _inspect(binary: Any, name: str, configuration: str, case: AotCase, arch: int) -> Compiled:
    ptx, shared = binary.asm["ptx"], binary.metadata.shared
    registers, stack = resource_usage(binary.asm["cubin"])
    found = [instruction for instruction in TENSOR_CORE_INSTRUCTION.values() if instruction in ptx]
    bulk_copies = BULK_COPY_INSTRUCTION in ptx
    problems = []
    if stack > 0:
        problems.append(f"spills: {stack} bytes of stack")
    if shared > SHARED_MEMORY_LIMIT[arch]:
        problems.append(f"shared memory above {SHARED_MEMORY_LIMIT[arch]}")
    if name in case.tensor_cores and TENSOR_CORE_INSTRUCTION[arch] not in found:
        problems.append(f"no {TENSOR_CORE_INSTRUCTION[arch]}")
    if name in case.bulk_copies and arch >= 90 and not bulk_copies:
        problems.append(f"no {BULK_COPY_INSTRUCTION}")
    tensor_core = "+".join(found) or "-"
    return Compiled(name, configuration, arch, registers, stack, shared, tensor_core, bulk_copies, tuple(problems))


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
