"""Settings of the rewards of reinforcement fine-tuning, and the reward functions of users, found by name."""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gp_jax.config.choices import check_choice
from gp_jax.errors import GlimpseError, reason, shown
from gp_jax.evaluation.settings import JudgeConfig
from gp_jax.runtime.disk import kind_of, path_of
from gp_jax.training.rewards.functions import JUDGE, REWARDS

# What a user's function may take, by name: lists of equal length, one item per completion, as TRL passes them.
COLUMNS = (
    "prompts",  # questions; the same as `question`
    "completions",  # texts
    "completion_ids",  # lists of token ids
    "question",
    "answer",  # text, or a tuple of texts where several answers are right
    "id",
    "dataset",
    "source",  # number of the data source
    "boxes",  # tuples of (x1, y1, x2, y2) as shares of the picture's width and height
    "cut",  # whether the completion reached the token limit
    "limit",  # tokens
)


@dataclass(frozen=True)
class RewardTerm:
    """One summand of a reward."""

    name: str = "exact_match"
    """exact_match, vqa_accuracy, anls, token_f1, precision_match, choice_letter, box_iou, length_penalty, judge; or your own function, as
    module:function or FILE.py:function, which is called as TRL calls reward functions."""
    weight: float = 1.0
    """Factor of the reward in the sum."""


@dataclass(frozen=True)
class RewardConfig:
    """Rewards of completions: a weighted sum of terms. A term that is missing makes the sum missing, never 0."""

    terms: tuple[RewardTerm, ...] = (RewardTerm(),)
    """Terms of all data sources that name none of their own."""
    judge: JudgeConfig = JudgeConfig()
    """Language model behind the term `judge`."""
    most_missing: float = 0.1
    """Largest share of a step's completions that may be without a reward; above it the run stops."""
    outage_hours: float = 12.0
    """Hours to wait for a judge that does not answer before the run stops."""
    length_free: float = 0.5
    """Share of the token limit below which length_penalty is 0; from there it falls linearly to -1 at the limit."""

    def check(self, where: str = "rewards") -> "RewardConfig":
        """Checks all fields, and finds the functions that terms name. Returns: self.

        Args: where: name of this configuration in messages. Raises: GlimpseError that names the field.
        """
        for name, low, high in (("most_missing", 0.0, 1.0), ("outage_hours", 0.0, 1e6), ("length_free", 0.0, 1.0)):
            if not (_is_number(value := getattr(self, name)) and low <= value <= high):
                raise GlimpseError(f"{where}.{name}={shown(value)} is not in {low:g}..{high:g}")
        if self.length_free == 1:
            raise GlimpseError(f"{where}.length_free=1 leaves no room for a penalty below the limit; it must be less")
        if not isinstance(self.judge, JudgeConfig):
            raise GlimpseError(f"{where}.judge={shown(self.judge)} must be a JudgeConfig")
        self.judge.check()
        if not self.terms:
            raise GlimpseError(f"{where}.terms is empty: name at least one reward")
        check_terms(self.terms, self.judge, f"{where}.terms")
        return self


def check_terms(terms: Sequence[RewardTerm], judge: JudgeConfig, where: str) -> None:
    """Checks terms, of the configuration or of a data source. where: name of the field. Raises: GlimpseError that names the field."""
    if not isinstance(terms, list | tuple):
        raise GlimpseError(f"{where}={shown(terms)} must be a list of RewardTerm")
    for number, term in enumerate(terms):
        place = f"{where}[{number}]"
        if not isinstance(term, RewardTerm) or not isinstance(term.name, str):
            raise GlimpseError(f"{place}={shown(term)} must be a RewardTerm with a name")
        if not _is_number(term.weight):
            raise GlimpseError(f"{place}.weight={shown(term.weight)} is not a finite number")
        if any(term.name == other.name for other in terms[:number]):
            raise GlimpseError(f"{place}.name={shown(term.name)} is named twice")
        if ":" in term.name:
            columns_of(find_function(term.name, f"{place}.name"), term.name, f"{place}.name")
        else:
            check_choice(f"{place}.name", term.name, (*REWARDS, JUDGE, "module:function"))
        if term.name == JUDGE and not judge.url:
            raise GlimpseError(f"{place}.name='judge' needs an endpoint: judge.url and judge.model")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max and math.isfinite(value)


def find_function(name: str, where: str = "reward") -> Callable[..., Any]:
    """The function of a name module:function or FILE.py:function. Modules are looked for in the working directory too.

    Args: where: name of the field in messages. Raises: GlimpseError that names the field.
    """
    module, _, attribute = name.rpartition(":")
    said = f"{where}={shown(name, 200)}"
    if not module or not attribute:
        raise GlimpseError(f"{said} must be module:function or FILE.py:function")
    try:
        found = _file_module(path_of(module).resolve()) if module.endswith(".py") else _module(module)
    except (Exception, SystemExit) as error:  # it may be any code
        raise GlimpseError(f"{said} cannot be imported ({_cause(error)})") from error
    try:
        function = operator.attrgetter(attribute)(found)
    except AttributeError as error:
        known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise GlimpseError(
            f"{said}: {shown(module, 200)} has no {shown(attribute)} (it has {', '.join(known[:8]) or 'no function'})"
        ) from error
    if not callable(function) or inspect.isclass(function):
        raise GlimpseError(f"{said} is not a function")
    return function


def _cause(error: BaseException) -> str:
    return reason(error) if isinstance(error, Exception) else type(error).__name__


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a file there must not hide an installed package
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _file_module(path: Path) -> ModuleType:
    """The module of a file, run once per process. Files beside it can be imported by it."""
    name = f"rewards_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if kind_of(path) != "file":
        raise GlimpseError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise GlimpseError(f"{path}: is not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@functools.lru_cache(maxsize=256)
def columns_of(function: Callable[..., Any], name: str, where: str = "reward") -> tuple[str, ...]:
    """The columns that a function takes: all with **kwargs, else those that it names.

    Raises: GlimpseError for a function with a required parameter that is no column, or that cannot be given by name.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code without a signature
        return COLUMNS
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in parameters:
        required = parameter.default is inspect.Parameter.empty and parameter.kind in (*named, inspect.Parameter.POSITIONAL_ONLY)
        if required and (parameter.kind not in named or parameter.name not in COLUMNS):
            raise GlimpseError(
                f"{where}={shown(name, 200)} needs a parameter {parameter.name!r}; columns are passed by name: {', '.join(COLUMNS)}"
            )
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return COLUMNS
    return tuple(parameter.name for parameter in parameters if parameter.kind in named and parameter.name in COLUMNS)
