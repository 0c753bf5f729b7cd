"""Methods with options as text: ``apet_plus`` or ``apet_plus:quota=0,similarity_floor=none``."""

import re
import typing
from typing import Any

from apet.config import parse_list
from apet.methods.base import get_method

_LARGEST = 10**9
_WORDS = {"true": True, "false": False, "none": None}
_COMMA = re.compile(r",(?![^\[]*\])")  # not those inside a list


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a method, checked.

    Options are the fields of the method's class. Values are true, false, none, numbers or words; false switches a
    number off, as 0 does.

    Raises:
        ValueError: An unknown method or option, or a value that its field cannot have.
    """
    name, _, rest = text.partition(":")
    types = typing.get_type_hints(type(get_method(name)))
    options = parse_options(rest, f"method {text!r}", f"{name}:option=value,option=value")
    for field in options.keys() & types.keys():
        options[field] = _checked(text, field, options[field], types[field])
    get_method(name, **options)
    return name, options


def parse_options(text: str, what: str, written: str) -> dict[str, Any]:
    """Options as text, ``option=value,option=value``; values are true, false, none, numbers, words or ``[8,16]``.

    Args:
        text: The options.
        what: What they belong to, for errors.
        written: How they are written, for errors.

    Raises:
        ValueError: A word without a value, an option that is set twice, or a list that is none.
    """
    options = {}
    for word in filter(None, _COMMA.split(text)):
        field, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise ValueError(f"{what}: {word!r} sets no option; write {written}")
        if field in options:
            raise ValueError(f"{what} sets {field} twice")
        options[field] = _value(value)
    return options


def _value(text: str) -> Any:
    if text.startswith("["):
        return parse_list(text, "the list")
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _checked(text: str, field: str, value: Any, hint: Any) -> Any:
    """The value as its field's type."""
    allowed = typing.get_args(hint) or (hint,)
    if isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:  # NaN compares false too
        raise ValueError(f"method {text!r}: {field} is {str(value)[:20]}, expected a number of at most {_LARGEST:,}")
    if type(value) in allowed:
        return value
    if value is False and (int in allowed or float in allowed):
        return 0
    if type(value) is int and float in allowed:
        return float(value)
    names = " or ".join("none" if kind is type(None) else kind.__name__ for kind in allowed)
    raise ValueError(f"method {text!r}: {field} is {value!r}, expected {names}")
