"""`adapter_config.json` of a LoRA adapter, as PEFT writes it.

Plain LoRA of linear layers is read. What would compute something else is refused by name. Fields that concern training alone are ignored,
and so are fields that PEFT will add with later versions, unless they switch a variant on (`use_...`).
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any, cast

import regex
from pydantic import Field

from gp_jax.config.schema import AtLeastOne, FromNumpy
from gp_jax.errors import GlimpseError, one_line, shown
from gp_jax.models.adapter import ALL_LINEAR, AdapterConfig, forms, module_names
from gp_jax.pretrained.fields import choice, refuse_if, value

Alpha = Annotated[float, Field(gt=0, le=1e12), FromNumpy]
Dropout = Annotated[float, Field(ge=0, lt=1), FromNumpy]
DEFAULTS = {"r": 8, "lora_alpha": 8.0, "lora_dropout": 0.0}  # of PEFT, for fields that are missing

# Fields that change what an adapter computes, or what it holds, when they are set.
REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
STARTS = ("gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the base's weights as they are
LAYERS = "layers"  # the name of the list of decoder layers in every family
MATCHING = 2.0  # seconds that one regular expression may take for all names together
LONGEST = 1 << 16  # characters of a regular expression


def read_settings(hf: Mapping[str, Any], where: str) -> AdapterConfig:
    """The settings in an `adapter_config.json`. Raises: GlimpseError that names file and field, also for what is not supported."""
    choice(hf, "peft_type", ("LORA",), where)
    choice(hf, "bias", ("none",), where, "none")
    for name in (*REFUSED, *(name for name in hf if name.startswith("use_") and name != "use_rslora")):
        refuse_if(hf.get(name) not in (None, False, [], {}, ""), f"{where}: {name}={shown(hf.get(name))} is not supported")
    start = hf.get("init_lora_weights")
    refuse_if(
        not (start is None or isinstance(start, bool) or (isinstance(start, str) and start.lower() in STARTS)),
        f"{where}: init_lora_weights={shown(start)} is not supported: it changes the base's weights too; save the adapter with PEFT's "
        "path_initial_model_for_weight_conversion",
    )
    return AdapterConfig(
        r=value(hf, "r", AtLeastOne, where, DEFAULTS["r"]),
        lora_alpha=value(hf, "lora_alpha", Alpha, where, DEFAULTS["lora_alpha"]),
        lora_dropout=value(hf, "lora_dropout", Dropout, where, DEFAULTS["lora_dropout"]),
        target_modules=names_in(hf, "target_modules", where),
        use_rslora=value(hf, "use_rslora", bool, where, False),
    )


def names_in(hf: Mapping[str, Any], name: str, where: str, default: Any = ...) -> tuple[str, ...] | str:
    """A field that holds a list of names or one text; null and nothing count as missing."""
    found = hf.get(name)
    if not found:
        refuse_if(default is ..., f"{where}: field '{name}' is missing")
        return default
    listed = isinstance(found, list) and all(isinstance(one, str) for one in found)
    refuse_if(not (listed or isinstance(found, str)), f"{where}: {name}={shown(found)} must be a list of names or one regular expression")
    return tuple(found) if listed else found


def meant(hf: Mapping[str, Any], layers: int, where: str) -> set[str]:
    """Dotted paths here of the decoder's linear layers that the file's fields name, by PEFT's rules. layers: of the decoder."""
    targets, excluded = names_in(hf, "target_modules", where), names_in(hf, "exclude_modules", where, ())
    chosen, left_out = Matcher(targets, f"{where}: target_modules"), Matcher(excluded, f"{where}: exclude_modules")
    numbers = None if isinstance(targets, str) else layer_numbers(hf, where)

    def is_meant(name: str) -> bool:
        other_layer = numbers is not None and int(name.split(".")[2]) not in numbers and chosen.names.isdisjoint(forms(name))
        return chosen(name) and not other_layer and not left_out(name)

    return {path for name, path in module_names(layers) if is_meant(name)}


def layer_numbers(hf: Mapping[str, Any], where: str) -> set[int] | None:
    """The layers that `layers_to_transform` restricts an adapter to; None: it does not."""
    pattern = names_in(hf, "layers_pattern", where, ())
    refuse_if(
        bool(pattern) and pattern != LAYERS and LAYERS not in tuple(pattern), f"{where}: layers_pattern={shown(pattern)} is not {LAYERS}"
    )
    found = hf.get("layers_to_transform")
    if found is None or found == []:
        return None
    numbers = found if isinstance(found, list) else [found]
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)
    refuse_if(not whole, f"{where}: layers_to_transform={shown(found)} must be a number or a list of numbers")
    return set(numbers)


class Matcher:
    """Whether a module of the decoder is meant by a list of names or ends of names, by a regular expression for whole names, or by
    "all-linear". Any name counts that transformers' versions have given the module: adapters are older than names."""

    def __init__(self, names: tuple[str, ...] | str, where: str):
        self.where, self.left, self.pattern = where, MATCHING, cast(Any, None)
        self.all = isinstance(names, str) and names.lower() == ALL_LINEAR
        self.names = frozenset(names if isinstance(names, tuple) else ())
        if isinstance(names, str) and not self.all:
            refuse_if(len(names) > LONGEST, f"{where}: a regular expression of {len(names)} characters")
            try:
                self.pattern = regex.compile(names)
            except (regex.error, RecursionError, OverflowError, ValueError) as error:
                raise GlimpseError(f"{where}: {shown(names)} is not a regular expression ({one_line(error)})") from error

    def __call__(self, name: str) -> bool:
        """name: of `models.adapter.module_names`. Raises: GlimpseError for a regular expression that takes too long."""
        if self.all:
            return True
        if self.pattern is not None:
            return any(self.matches(form) for form in forms(name))
        return any(form.split(".", count)[-1] in self.names for form in forms(name) for count in range(form.count(".") + 1))

    def matches(self, form: str) -> bool:
        """Whether the regular expression matches a whole name. It comes from a stranger: Python's own `re` could be kept busy for years."""
        start = time.monotonic()
        try:
            found = self.pattern.fullmatch(form, timeout=max(self.left, 1e-3))
        except (TimeoutError, RecursionError, MemoryError) as error:
            raise GlimpseError(f"{self.where}: the regular expression takes too long") from error
        self.left -= time.monotonic() - start
        return found is not None


def written(config: AdapterConfig, modules: list[str], base_name: str | None) -> dict[str, Any]:
    """An `adapter_config.json` for PEFT of any version. modules: whole names."""
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": base_name}
    fields |= {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout, "target_modules": modules}
    fields |= {"bias": "none", "use_rslora": config.use_rslora, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True}
    fields |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None}
    return fields | {"auto_mapping": None, "revision": None}
