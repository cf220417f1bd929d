"""Settings with a fixed set of words: the words and their check, without importing what they select."""

import difflib
from collections.abc import Iterable
from typing import Literal, get_args

from gp_jax.errors import GlimpseError, shown

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "muon")
ATTENTION = ("auto", "einsum", "split_batch", "blockwise", "rows", "splash", "splash_interpret", "cudnn")  # of ops.attention
Activation = Literal["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu"]  # of ops.layers
Norm = Literal["rmsnorm", "layernorm"]
PredictorKind = Literal["AttnFuserV1", "AttnFuserV2", "mean"]  # mean: of the glimpse maps, nothing is learned (ours, for ablations)
NORMS, PREDICTORS = get_args(Norm), get_args(PredictorKind)


def check_choice(field: str, value: object, known: Iterable[str]) -> None:
    """Raises: GlimpseError that names the field and the nearest word, unless `value` is one of those known."""
    known = tuple(known)
    if value in known:
        return
    by_small = {word.lower(): word for word in known}
    near = difflib.get_close_matches(str(value)[:80].lower(), by_small, n=1)
    hint = f", did you mean '{by_small[near[0]]}'?" if near else ""
    raise GlimpseError(f"{field}={shown(value)} is not one of {', '.join(known)}{hint}")
