"""What the commands share: a parser whose errors are one line, exit code 2, and the reading of amounts of memory."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import jsonargparse
from tqdm import tqdm


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


def parse_bytes(text: str) -> int:
    """ "8GiB", "500 MB" or a plain number of bytes; ValueError for anything else."""
    pattern = r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?\s*"
    match = re.fullmatch(pattern, text, re.IGNORECASE) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is no amount of memory; wanted a number and a unit, such as 8GiB or 500MB")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " kmgt".index(prefix.lower() or " "))
