"""What a field of a file from a stranger may hold: types with bounds, written where the field is declared, checked by pydantic.

    @dataclass(frozen=True)
    class TextConfig:
        num_hidden_layers: Layers
        rms_norm_eps: Small = 1e-6

Strict: `true` is no number and "8" is none. A number is finite. What several fields must satisfy together is checked where they are read.
"""

import dataclasses
import functools
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from gp_jax.errors import GlimpseError, printable

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Size = Annotated[int, Field(ge=1, le=2**20)]  # of an axis
Layers = Annotated[int, Field(ge=1, le=512)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Small = Annotated[float, Field(gt=0, lt=1)]  # what a division by zero is kept away with
Number = Annotated[float, Field(ge=-1e12, le=1e12)]


@functools.cache
def _fields(kind: type) -> dict[str, TypeAdapter]:
    hints, settings = get_type_hints(kind, include_extras=True), ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    own = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    return {name: TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else settings) for name, hint in own.items()}


def checked(config: Any, where: str) -> Any:
    """A dataclass whose fields hold what they are annotated with. Raises: GlimpseError that names file and field."""
    for name, adapter in _fields(type(config)).items():
        value = getattr(config, name)
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise GlimpseError(f"{where}: {name}={printable(repr(value), 80)}: {_said(first['msg'])}") from error
    return config


def _said(message: str) -> str:
    return message.replace("Input should", "must")
