"""What a step's log line says about completions and rewards, as sums from which means are made when the line is written."""

import math
from collections.abc import Sequence

import numpy as np

from gp_jax.training.plus.advantages import Advantages
from gp_jax.training.plus.rollouts import Rollout
from gp_jax.training.plus.settings import PlusConfig
from gp_jax.training.rewards.rewarding import Rewarded

SUM, SQUARES, COUNT = "sum:", "squares:", "count:"  # prefixes of what `means` turns into mean and standard deviation


def facts(
    rollout: Rollout, rewarded: Sequence[Rewarded], found: Advantages, sources: Sequence[str], config: PlusConfig
) -> dict[str, float]:
    """Metrics of a step that the host knows. sources: names of the data sources."""
    group = config.policy.group_size
    lengths = [len(tokens) for tokens in rollout.tokens]
    shares = [float(mask.mean()) for mask in rollout.masks if mask.size]
    values: dict[str, list[float]] = {"reward": [], **{f"reward/{number}_{short(name)}": [] for number, name in enumerate(sources)}}
    names = dict.fromkeys(term.name for term in config.rewards.terms)
    names |= dict.fromkeys(name.partition("=")[0] for source in config.data.sources for name in source.rewards)
    values |= {f"reward/{name}": [] for name in names}
    for place, own in enumerate(rewarded):
        if own.total is not None:
            number = rollout.questions[place // group].source
            values["reward"].append(own.total)
            values[f"reward/{number}_{short(sources[number])}"].append(own.total)
        for name, value in own.terms.items():
            if value is not None:
                values[f"reward/{name}"].append(value)
    out = {
        "completion_tokens": float(np.mean(lengths)),
        "cut": float(np.mean(rollout.cut)),
        "flat": float(np.mean(found.flat)),
        "missing": float(np.mean(found.missing)),
        "counted": float(np.mean(found.counted)),
        "retention": float(np.mean(shares)) if shares else 1.0,
        "decode_padding": rollout.padding,
    }
    for name, own_values in values.items():
        out |= {
            f"{SUM}{name}": sum(own_values),
            f"{SQUARES}{name}": sum(v * v for v in own_values),
            f"{COUNT}{name}": float(len(own_values)),
        }
    return out


def means(values: dict[str, float]) -> dict[str, float]:
    """A log line: sums become means and standard deviations. Sources and functions without a value have none; without any reward at all
    the mean is NaN."""
    out = {name: value for name, value in values.items() if not name.startswith((SUM, SQUARES, COUNT))}
    for name, count in values.items():
        if name.startswith(COUNT) and (count or "/" not in name):
            own = name.removeprefix(COUNT)
            mean = values[SUM + own] / count if count else math.nan
            spread = math.sqrt(max(0.0, values[SQUARES + own] / count - mean * mean)) if count else math.nan
            out |= {own: mean, f"{own}_std": spread}
    return out


def short(name: str) -> str:
    """The last part of a data source's path."""
    return name.rstrip("/").rpartition("/")[2]
