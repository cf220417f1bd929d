"""`adapter_config.json` of a LoRA adapter, as PEFT writes it.

Plain LoRA of linear layers is read. What would compute something else is refused by name. Fields that concern training alone are ignored,
and so are fields that PEFT will add with later versions, unless they switch a variant on (`use_...`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from gp_jax.config.schema import AtLeastOne, FromNumpy
from gp_jax.errors import GlimpseError, one_line, shown
from gp_jax.models.adapter import ALL_LINEAR, AdapterConfig, forms, module_names
from gp_jax.pretrained import pattern_worker
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
WAIT = 60.0  # seconds for `pattern_worker` on a busy machine; its own limit is a second of CPU time
KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # environment variables that it gets


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
    known = dict(module_names(layers))
    targets, excluded = names_in(hf, "target_modules", where), names_in(hf, "exclude_modules", where, ())
    found = meant_by(targets, list(known), f"{where}: target_modules") - meant_by(excluded, list(known), f"{where}: exclude_modules")
    numbers = None if isinstance(targets, str) else layer_numbers(hf, where)
    if numbers is not None:  # whole names are exempt
        whole = frozenset(targets)
        found = {name for name in found if int(name.split(".")[2]) in numbers or not whole.isdisjoint(forms(name))}
    return {known[name] for name in found}


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


def meant_by(names: tuple[str, ...] | str, known: Sequence[str], where: str) -> set[str]:
    """Those of the known modules that are meant by a list of names or ends of names, by a regular expression for whole names, or by
    "all-linear". Any name counts that transformers' versions have given a module: many adapters are older than today's names."""
    if isinstance(names, str):
        by_form = {form: name for name in known for form in forms(name)}
        return set(known) if names.lower() == ALL_LINEAR else {by_form[form] for form in matching(names, list(by_form), where)}
    ends = frozenset(names)

    def has_end(form: str) -> bool:
        return any(form.split(".", count)[-1] in ends for count in range(form.count(".") + 1))

    return {name for name in known if any(map(has_end, forms(name)))}


def matching(expression: str, names: Sequence[str], where: str) -> list[str]:
    """Those of the names that a regular expression matches whole. It may be anyone's, so `pattern_worker` does it.

    Raises: GlimpseError when it is no regular expression or takes too much time or memory.
    """
    command, kept = [sys.executable, "-I", "-S", pattern_worker.__file__], {name: os.environ[name] for name in KEPT if name in os.environ}
    try:
        done = subprocess.run(command, input=json.dumps([expression, list(names)]), capture_output=True, text=True, timeout=WAIT, env=kept)
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise GlimpseError(f"{where}: the regular expression {shown(expression)} takes too much time or memory") from error
    if "found" not in answer:
        raise GlimpseError(f"{where}: {shown(expression)} is not a regular expression ({one_line(answer['reason'])})")
    return [names[number] for number in answer["found"]]


def written(config: AdapterConfig, modules: list[str], base_name: str | None) -> dict[str, Any]:
    """An `adapter_config.json` for PEFT of any version. modules: whole names."""
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": base_name}
    fields |= {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout, "target_modules": modules}
    fields |= {"bias": "none", "use_rslora": config.use_rslora, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True}
    fields |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None}
    return fields | {"auto_mapping": None, "revision": None}
