"""What a kernel's machine code (SASS of sm_90) makes its threads wait for.

Nothing here is a timing. It counts, in the instructions that ptxas scheduled, what a program must wait for one after
the other: that is what limits a kernel with few programs per SM, whatever the bandwidth.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+):")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")


@dataclass(frozen=True)
class Waits:
    """Of the main loop: the smallest with a wgmma or, without any, with a load; of the whole kernel if it has no loop.

    phases: serial round trips to memory: loads that need what an earlier load returned, or that the compiler placed
        after its first use. Asynchronous copies do not count. 0 in kernels with wgmma.
    barriers: of all the program's warps.
    copies: waits for asynchronous copies before the first wgmma, each for copies issued after the one before.
    drains: waits until no wgmma is in flight.
    """

    phases: int
    barriers: int
    copies: int = 0
    drains: int = 0


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin, by Triton's nvdisasm."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]  # no data flow: the same text, sooner
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def waits(sass: str) -> Waits:
    """Counts them in the SASS of one kernel."""
    code, labels = _parse(sass)
    wgmma = any(line.startswith("HGMMA") for line in code)
    loop = _main_loop(code, labels, "HGMMA" if wgmma else "LDG.")
    barriers = _count(loop, "BAR.SYNC")
    if wgmma:
        return Waits(0, barriers, _copy_waits(code), _count(loop, "WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    return Waits(_load_phases(loop), barriers)


def _count(code: list[str], start: str) -> int:
    return sum(line.startswith(start) for line in code)


def _parse(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions, without predicates, and which of them each label precedes. Predicated exits are left out."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif (instruction := _INSTRUCTION.search(line)) and not re.search(r"@\S+\s+EXIT", line):
            code.append(instruction[1])
    return code, labels


def _main_loop(code: list[str], labels: dict[str, int], contains: str) -> list[str]:
    """A jump back across an EXIT is no loop: the rare second try of a wait stands behind the kernel's end."""
    loops = []
    for end, line in enumerate(code):
        target = re.match(r"BRA.*`\((\.L_x_\d+)\)", line)
        start = labels.get(target[1], end) if target else end
        body = code[start : end + 1]
        if start < end and "EXIT" not in body and _count(body, contains):
            loops.append(body)
    return min(loops, key=len, default=code)


def _copy_waits(code: list[str]) -> int:
    """A wait counts if copies were issued since the last one that does."""
    found, issued = 0, False
    for line in code:
        if line.startswith("HGMMA"):
            break
        if line.startswith(("UTMALDG", "LDGSTS")):
            issued = True
        elif issued and line.startswith(("SYNCS.PHASECHK", "DEPBAR.LE SB0")):
            found, issued = found + 1, False
    return found


def _load_phases(code: list[str]) -> int:
    """Instructions issue in order. A load's phase is the number of waits for loads before it: using a register that a
    load of phase p writes ends phase p for what follows."""
    pending: dict[int, int] = {}
    phase, used = 0, set()
    for line in code:
        opcode, _, operands = line.partition(" ")
        kind = opcode.split(".")[0]
        target, sources = "", operands
        if kind in ("LDG", "LDGSTS"):
            target, _, sources = operands.partition(",")
        waited = [pending[register] for register in _registers(sources, _width(opcode, kind)) if register in pending]
        if waited:
            phase = max(phase, max(waited) + 1)
            pending = {register: p for register, p in pending.items() if p > max(waited)}
        if kind == "LDG":
            pending.update(dict.fromkeys(_registers(target, _width(opcode, kind)), phase))
            used.add(phase)
    return len(used)


def _width(opcode: str, kind: str) -> int:
    """Registers of each operand, addresses apart."""
    if ".128" in opcode:
        return 4
    return 2 if ".64" in opcode and kind in ("LDG", "STG", "LDS", "STS") else 1


def _registers(operands: str, width: int) -> set[int]:
    """Their numbers; an address is marked as two by `.64`."""
    found: set[int] = set()
    for match in _REGISTER.finditer(operands):
        first = int(match[1])
        found.update(range(first, first + (2 if match[2] else width)))
    return found
