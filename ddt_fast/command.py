"""What the commands share: a parser whose errors are one line, with exit code 2, and name options."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from inspect import signature
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse
from tqdm import tqdm

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
            message += f"; nearest: {', '.join(nearest)}" if nearest else "; --help lists what there is"
        fail(message)

    def add_options(
        self, function: Callable[..., Any], *names: str, without: Collection[str] = (), words: Any = None, **more: Any
    ) -> None:
        """Add an option for each parameter of a function or settings class: its type, default and description.

        A sequence takes its values one after the other, a bool is a flag; of a union the first type counts.

        Args:
            function: with annotations, and a docstring in which a name in `backticks` is a parameter.
            names: parameters; none: all.
            without: parameters that are left out.
            words: descriptions by name, in place of the docstring's.
            more: `default`, in place of the parameters' own.
        """
        documented = docstring_parser.parse(function.__doc__ or "").params
        helps = {entry.arg_name: entry.description or "" for entry in documented} | (words or {})
        hints = get_type_hints(function)
        for name, parameter in signature(function).parameters.items():
            if name in (names or hints) and name not in without:
                kind = _argument(hints[name])
                if "action" not in kind:
                    default = more.get("default", parameter.default)
                    kind["default"] = list(default) if isinstance(default, tuple) else default
                text = re.sub(r"`(\w+)`", lambda match: _option(match[1]), " ".join(helps[name].split()).rstrip("."))
                self.add_argument(_option(name), help=text, **kind)

    def name_options(self, text: str) -> str:
        """The text with options for parameters: `num_png` in backticks, or a first word as in "num_png is -1"."""
        options = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        text = re.sub(r"`(\w+)`", lambda match: options.get(match[1], match[1]), text)
        return re.sub(r"^\w+(?= is )", lambda match: options.get(match[0], match[0]), text)

    @contextmanager
    def naming_options(self) -> Iterator[None]:
        """Within, a ValueError of a function names the command's options for the function's parameters."""
        try:
            yield
        except ValueError as error:
            raise ValueError(self.name_options(str(error))) from error


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _argument(hint: Any) -> dict[str, Any]:
    """What argparse is told of a type."""
    kind, inner = get_origin(hint), get_args(hint)
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
    """The settings of that class that parsed options name; ValueError for values that are not allowed."""
    return kind(**{name: getattr(options, name) for name in signature(kind).parameters})


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
