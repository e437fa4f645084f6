"""What the commands share: a parser made from functions and their docstrings, and one-line errors with exit code 2.

Commands start fast: a command's module, and what it imports at the top, imports neither torch nor NumPy nor anything
else slow, so that `--help` and errors in options come at once. Its work lies in another module (`ddt_fast.work` where
no other folder fits), which the command's function imports after it has checked its arguments.
"""

import codecs
import difflib
import io
import os
import re
import sys
import warnings
from argparse import BooleanOptionalAction
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from ddt_fast.interrupts import work_to_clean_up
from ddt_fast.wording import one_line, warn

Settings = TypeVar("Settings")


class CommandParser(jsonargparse.ArgumentParser):
    """A parser whose errors are one `error:` line and exit code 2, and which takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message, re.IGNORECASE)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            nearest = difflib.get_close_matches(unknown[1], options, n=3)
            message += f"; nearest: {', '.join(nearest)}" if nearest else "; --help lists the options"
        # jsonargparse takes neither "ten" nor "nan" for a float, and says the same of both.
        problem = r"Parser key \"([\w.]+)\".*?Expected a <class '(int|float)'>.*?value: (\S+)"
        wrong = re.match(problem, " ".join(message.split()))
        if wrong:
            allowed = {"int": "a whole number", "float": "a finite number"}[wrong[2]]
            message = self.name_options(f"`{wrong[1]}` is {wrong[3]}; allowed: {allowed}")
        fail(message)

    def add_options(
        self,
        function: Callable[..., Any],
        *names: str,
        without: Collection[str] = (),
        positional: Collection[str] = (),
        words: Any = None,
        **more: Any,
    ) -> None:
        """Add an option for each parameter of a function or settings class, with its type, default and description.

        A sequence takes several values, a bool is a flag, one that may be None has two (--name and --no-name), and
        another union takes its first type. A parameter without a default is required. In the function's docstring, a
        name in `backticks` is a parameter.

        Args:
            names: the parameters; default: all.
            without: parameters to leave out.
            positional: parameters that are given by their place, not as options.
            words: descriptions by name, in place of the docstring's.
            more: `default`, in place of the parameters' own.
        """
        documented = docstring_parser.parse(function.__doc__ or "").params
        helps = {entry.arg_name: entry.description or "" for entry in documented} | (words or {})
        hints = _parameter_types(function)
        for name, parameter in signature(function).parameters.items():
            if name in (names or hints) and name not in without:
                kind, default = _argument(hints[name]), more.get("default", parameter.default)
                if default is Parameter.empty:
                    kind |= {} if name in positional else {"required": True}
                elif "action" not in kind:
                    kind["default"] = list(default) if isinstance(default, tuple) else default
                text = re.sub(r"`(\w+)`", lambda match: _option(match[1]), " ".join(helps[name].split()).rstrip("."))
                self.add_argument(name if name in positional else _option(name), help=text, **kind)

    def name_options(self, text: str) -> str:
        """Replace parameters in a text with their options, and those given by place with their names in capitals:
        `num_png` in backticks, or "num_png" in "num_png is -1"."""
        options = {action.dest: (*action.option_strings, action.dest.upper())[0] for action in self._actions}
        text = re.sub(r"`([\w.]+)`", lambda match: options.get(match[1], match[1]), text)
        return re.sub(r"^\w+(?= is )", lambda match: options.get(match[0], match[0]), text)

    @contextmanager
    def naming_options(self) -> Iterator[None]:
        """Make a ValueError name the command's options instead of a function's parameters."""
        try:
            yield
        except ValueError as error:
            raise ValueError(self.name_options(str(error))) from error


def _parameter_types(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of the parameters by name. The type of the result may be one that only type checkers import."""
    if isinstance(function, type):
        return get_type_hints(function)
    annotations = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    return get_type_hints(SimpleNamespace(__annotations__=annotations), function.__globals__)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _argument(hint: Any) -> dict[str, Any]:
    """argparse's arguments for a type."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint == bool | None:
        return {"action": BooleanOptionalAction}
    if kind in (Union, UnionType):
        return _argument(next(option for option in inner if option is not NoneType))
    if hint is bool:
        return {"action": "store_true"}
    if kind is Literal:
        return {"choices": inner}
    if kind is tuple and ... not in inner:  # an interval
        return {**_argument(inner[0]), "nargs": 2, "metavar": ("LOW", "HIGH")}
    return {**_argument(inner[0]), "nargs": "+"} if inner else {"type": hint}


def read_options(options: Any, kind: Callable[..., Settings]) -> Settings:
    """Make settings of a class from parsed options; ValueError for values that are not allowed."""
    return kind(**{name: getattr(options, name) for name in signature(kind).parameters})


def fail(message: str) -> NoReturn:
    """Print one `error:` line to stderr and exit with code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def _escape(error: UnicodeError) -> tuple[str, int]:
    r"""Show what a stream cannot encode: bytes of file names that are not UTF-8 as \xe9, characters as \u2192."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    # Python keeps such a byte as a lone surrogate.
    shown = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text)
    return shown.encode("ascii", "backslashreplace").decode(), error.end


def run_command(command: Callable[[], Any]) -> None:
    """Run a command's main function. A user's mistake (ValueError), or a file that cannot be read or written, ends it
    with one `error:` line and exit code 2, an interrupt with exit code 130. A warning is one line.
    What stdout or stderr cannot encode is escaped."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        warn(str(message))

    warnings.showwarning = show
    codecs.register_error("escape", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="escape")
    # Read when torch is imported: threads that wait for each other sleep. If they spin, and another job on the machine
    # has the core of one of them, a small operation takes a time slice of the scheduler in place of microseconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with work_to_clean_up():
            command()
    except (ValueError, OSError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ == "InductorError":
            fail(f"torch.compile cannot compile here: {one_line(error)}")
        # A failed CPU allocation is a plain RuntimeError.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        fail(f"out of memory: {one_line(error) if str(error) else 'take a smaller model or batch'}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
