"""What the commands share: one-line errors with exit code 2, and the choice of device and dtype."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import jsonargparse
import torch
from tqdm import tqdm

from ddt_fast.checks import require
from ddt_fast.model.cpu import cpu_has_bf16
from ddt_fast.ranks import process_ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CommandParser(jsonargparse.ArgumentParser):
    """A parser whose errors are one `error:` line and exit code 2, and which takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message, re.IGNORECASE)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            nearest = difflib.get_close_matches(unknown[1], options, n=3)
            message += f"; nearest: {', '.join(nearest)}" if nearest else "; --help lists what there is"
        fail(message)


def fail(message: str) -> NoReturn:
    """Print one `error:` line to stderr and exit with code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def run_command(command: Callable[[], Any]) -> None:
    """Run a command's main function: a user's mistake (ValueError), or a file that cannot be read or written, ends it
    with one `error:` line and exit code 2; an interrupt with exit code 130. Warnings are one line each."""

    def one_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        tqdm.write(f"warning: {message}", file=sys.stderr)  # beside a progress bar, not into it

    warnings.showwarning = one_line
    try:
        command()
    except (ValueError, OSError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        # A CPU allocation that fails is a plain RuntimeError.
        if type(error).__name__ == "InductorError":
            fail(f"torch.compile cannot compile here: {str(error).splitlines()[0]}")
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        fail(f"out of memory: {str(error).splitlines()[0] if str(error) else 'take a smaller model or batch'}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one, else the CPU. Under torchrun, "cuda" is the GPU of
    this process's own. ValueError where it is not usable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = process_ranks()
    if name == "cuda" and ranks.world_size > 1:
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); allowed: auto, cpu, cuda, cuda:N") from error
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers; allowed: auto, cpu, cuda, cuda:N")
    return device


def choose_dtype(name: str, device: torch.device, latents: bool) -> torch.dtype:
    """The dtype called `name`. "auto" is bfloat16 for latent models where the device has units for it, else float32:
    small pixel models gain nothing from it."""
    if name != "auto":
        require(name in DTYPES, "dtype", name, f"auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    has_units = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if latents and has_units else torch.float32


def parse_bytes(text: str) -> int:
    """ "8GiB", "500 MB" or a plain number of bytes; ValueError for anything else."""
    pattern = r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?\s*"
    match = re.fullmatch(pattern, text, re.IGNORECASE) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is no amount of memory; wanted a number and a unit, such as 8GiB or 500MB")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " kmgt".index(prefix.lower() or " "))
