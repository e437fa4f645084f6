"""Checks of settings: a refusal names the setting, its value and what is allowed."""

import difflib
import math
import os
from collections.abc import Callable, Collection, Iterable
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ddt_fast.wording import kind_of


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError with the setting, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def require_int(name: str, value: object, minimum: int) -> None:
    """Require a whole number of at least `minimum`; True and False are not numbers."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(valid, name, value, f"a whole number, {minimum} or more")


def whole_numbers(name: str, values: object) -> list[int] | None:
    """Require a list of one or more whole numbers, Python's or NumPy's; return them as Python ints. None stays None."""
    if values is None:
        return None
    allowed = "a list of whole numbers, at least one"
    require(isinstance(values, Iterable) and not isinstance(values, (str, bytes)), name, values, allowed)
    numbers = list(values)  # type: ignore[call-overload]
    valid = all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)
    require(bool(numbers) and valid, name, values, allowed)
    return [int(number) for number in numbers]


def require_kind(name: str, value: object, kind: type) -> None:
    """Require an instance of the class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {kind_of(value)}; expected {kind.__name__}")


def require_path(name: str, value: object) -> Path:
    """Require a path or a string that is not empty; return it as a Path."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name} is {kind_of(value)}; expected a path")
    if not str(value):
        raise ValueError(f"{name} is empty; expected a path")
    return Path(value)


def require_arguments(function: str, given: Iterable[str], allowed: Collection[str]) -> None:
    """Require keyword arguments that the function has; the message names the nearest one, or all of them."""
    unknown = next((name for name in given if name not in allowed), None)
    if unknown is not None:
        nearest = difflib.get_close_matches(unknown, allowed, n=1, cutoff=0.5)
        hint = f"nearest: {nearest[0]}" if nearest else f"allowed: {', '.join(allowed)}"
        raise ValueError(f"{function} has no argument {unknown!r}; {hint}")


def require_number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Require a finite number from low, or with open_low above low, to high."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    valid = valid and low <= value <= high and not (open_low and value == low)  # type: ignore[operator]
    finite = "finite " if isinstance(value, float) and not math.isfinite(value) else ""
    upper = f" up to {high:g}" if high < math.inf else ""
    require(valid, name, value, f"a {finite}number {'above' if open_low else 'from'} {low:g}{upper}")


def require_pair(name: str, value: object, valid: Callable[[float, float], bool], allowed: str) -> tuple[float, float]:
    """Require a tuple or list of two numbers for which `valid` holds; return it as a tuple."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, (int, float)) for n in value)
    require(pair and valid(*value), name, value, allowed)  # type: ignore[misc]
    return tuple(value)  # type: ignore[arg-type, return-value]


def require_name(name: str, value: object, allowed: str) -> None:
    """Require None or a string that is not empty."""
    require(value is None or (isinstance(value, str) and value != ""), name, value, allowed)


def require_choice(name: str, value: object, choices: Any) -> None:
    """Require one of a Literal's values."""
    options = get_args(choices)
    require(value in options, name, value, ", ".join(str(option) for option in options))


def require_choices_and_flags(settings: Any) -> None:
    """Require that each Literal field of a dataclass has one of its values, and each bool field True or False, or None
    if its type says so."""
    for name, kind in _annotations(type(settings)).items():
        if get_origin(kind) is Literal:
            require_choice(name, getattr(settings, name), kind)
        elif kind in (bool, bool | None):
            value = getattr(settings, name)
            require(isinstance(value, bool) or (value is None and kind is not bool), name, value, "true or false")


_annotations: Callable[[type], dict[str, Any]] = cache(get_type_hints)
