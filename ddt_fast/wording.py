"""What messages share: their words, and lines on stderr that leave a progress bar whole."""

import json
import sys
import time
from typing import Any

from tqdm import tqdm


def plural(number: int, noun: str) -> str:
    """A number of things: "1 image", "50,000 images", "0 classes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def kind_of(value: object) -> str:
    """A value's type: "an int", "a str"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def one_line(error: BaseException) -> str:
    """An error's message on one line of up to 200 characters; its type if it has no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def utf8(text: str) -> str:
    """Text as any file can hold it: what has no UTF-8, such as the odd bytes of a folder's name, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings (plain JSON values) in which two dictionaries differ: "sampling.num_steps 25, now 50"."""
    found = []
    for name in {**theirs, **ours}:
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} {_short(a)}, now {_short(b)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def tell(text: str) -> None:
    """Print a line on stderr, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def warn(text: str) -> None:
    """As `tell`, marked as a warning."""
    tell(f"warning: {text}")


class CompilationNotice:
    """Says, if `compiling`, that the model is being compiled, and after the first step how long that took."""

    def __init__(self, compiling: bool) -> None:
        self._started = time.perf_counter() if compiling else None
        if compiling:
            tell("compiling the model (torch.compile): the first step may take several minutes")

    def step_done(self) -> None:
        """Called after every step."""
        if self._started is not None:
            tell(f"compiled: the first step took {time.perf_counter() - self._started:.1f} s")
            self._started = None
