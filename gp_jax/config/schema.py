"""Types with bounds for settings, written where a field is declared and checked by pydantic.

    @dataclass(frozen=True)
    class TextConfig:
        num_hidden_layers: Layers
        rms_norm_eps: Small = 1e-6

Strict: neither `true` nor "8" is a number; numbers must be finite; lists become tuples, and NumPy numbers become Python numbers.
Conditions on several fields together are checked where they are read. A dataclass is not checked when it is built, but by the code that
reads it from a file or takes it from a caller: that code knows where a value comes from and can name it in the message.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_type_hints

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from gp_jax.errors import GlimpseError, one_line, shown

LARGEST = 2**31 - 1  # of int32, the type of counts and token ids in arrays
if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Config = TypeVar("Config", bound="DataclassInstance")


def _python(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _tuple(value: Any) -> Any:
    value = _python(value)
    return tuple(value) if isinstance(value, list) else value


FromNumpy = BeforeValidator(_python)
Flag = Annotated[bool, FromNumpy]
Whole = Annotated[int, Field(ge=-LARGEST, le=LARGEST), FromNumpy]
Number = Annotated[float, Field(ge=-1e12, le=1e12), FromNumpy]
Several = Annotated[tuple[T, ...], Field(max_length=1024, fail_fast=True), BeforeValidator(_tuple)]  # Several[Count]

Count = Annotated[int, Field(ge=0, le=LARGEST), FromNumpy]
AtLeastOne = Annotated[int, Field(ge=1, le=LARGEST), FromNumpy]
Seed = Annotated[int, Field(ge=0, lt=2**63), FromNumpy]
TokenId = Count
Width = Annotated[int, Field(ge=1, le=2**16)]  # of features, heads included
Size = Annotated[int, Field(ge=1, le=2**20)]  # of the longest axes: a vocabulary, the inner width of an MLP
Layers = Annotated[int, Field(ge=1, le=512)]
Layer = Annotated[int, Field(ge=0, lt=512)]
Pixels = Annotated[int, Field(ge=1, le=2**13)]  # of a side
Few = Annotated[int, Field(ge=1, le=16)]
Share = Annotated[float, Field(ge=0, le=1), FromNumpy]
Small = Annotated[float, Field(ge=1e-30, lt=1)]  # an epsilon, added to a divisor; a smaller one could be 0 in float32
RopeBase = Annotated[float, Field(ge=1, le=1e12)]  # below 1 frequencies would increase and exceed one cycle per token


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, without those that hold dataclasses: they are checked on their own."""
    found = get_type_hints(kind, include_extras=True)
    own = {field.name: found[field.name] for field in dataclasses.fields(kind)}
    return {name: hint for name, hint in own.items() if not any(map(_is_dataclass, (hint, *get_args(hint))))}


def _is_dataclass(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def one(kind: Any, value: Any, name: str, where: str = "") -> Any:
    """The value, checked against this type. name, where: its name and place in a message. Raises: GlimpseError that names it."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        # Of a union of types, report the error of the one that the value matches deepest.
        errors = [([i for i in found["loc"] if isinstance(i, int)], found) for found in error.errors(include_url=False)]
        index, deepest = max(errors, key=lambda found: len(found[0]))
        name += "".join(f"[{i}]" for i in index)
        raise GlimpseError(f"{where}{': ' if where else ''}{name}={shown(deepest['input'])}: {_said(deepest)}") from error


def values(config: Any, where: str = "", names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The checked values of a dataclass's fields. names: of fields that their source calls otherwise. Raises: GlimpseError."""
    called, cls = names or {}, cast(Any, type(config))
    return {name: one(hint, getattr(config, name), called.get(name, name), where) for name, hint in hints(cls).items()}


def checked(config: Config, where: str = "", names: Mapping[str, str] | None = None) -> Config:
    """The dataclass with its fields checked and converted by `values`. Args, raises: as there."""
    return dataclasses.replace(config, **values(config, where, names))


SAID = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "missing": "is too short",
    "too_short": "must have a length of at least {min_length}, not {actual_length}",
    "too_long": "must have a length of at most {max_length}, not {actual_length}",
}


def _said(error: Mapping[str, Any]) -> str:
    bounds = {name: f"{bound:.15g}" if isinstance(bound, float) else bound for name, bound in error.get("ctx", {}).items()}
    said = SAID.get(error["type"])
    return said.format(**bounds) if said else one_line(error["msg"].replace("Input should", "must"))
