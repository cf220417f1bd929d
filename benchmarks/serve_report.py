"""What `benchmarks.serve` concludes and draws."""

import statistics
from pathlib import Path


def rates(found: dict) -> dict[str, dict[int, float]]:
    """Requests per second by contender and users, medians of the rounds."""
    values: dict[str, dict[int, list[float]]] = {}
    for run in found["loads"]:
        if run["loop"] == "closed":
            values.setdefault(run["contender"], {}).setdefault(run["users"], []).append(run["per_second"])
    return {name: {users: statistics.median(own) for users, own in by.items()} for name, by in values.items()}


def verdicts(found: dict) -> dict[str, float | str]:
    """Ratios that the goals are about."""
    by, made = rates(found), {}
    for name in ("glimpse", "cap"):
        if name in by and "dense" in by:
            ratios = {users: by[name][users] / by["dense"][users] for users in by[name]}
            made[f"{name} / dense by users"] = ", ".join(f"{users}: {ratio:.2f}" for users, ratio in ratios.items())
        alone = [run["per_second"] for run in found["static"] if run["contender"] == name]
        if name in by and alone:
            made[f"{name} / best static batches"] = round(max(by[name].values()) / max(alone), 2)
        cached = {run["vision_cache"]: run["per_second"] for run in found["follow_ups"] if run["contender"] == name}
        if len(cached) == 2:
            made[f"{name} with / without vision cache"] = round(cached["1G"] / cached["0"], 2)
    for name in by:
        runs = [run["stages"] for run in found["loads"] if run["contender"] == name and run["loop"] == "closed"]
        decode, host = (sum(stages[stage] for stages in runs) for stage in ("decode", "host"))
        made[f"{name} host / decode"] = round(host / decode, 3) if decode else 0.0
    return made


def plot(found: dict, path: Path) -> None:
    """Requests per second, time to the first token and gap between tokens over users."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for name in rates(found):
        runs = [run for run in found["loads"] if run["contender"] == name and run["loop"] == "closed"]
        users = [run["users"] for run in runs]
        axes[0].plot(users, [run["per_second"] for run in runs], "o-", label=name)
        for axis, field in zip(axes[1:], ("first", "gap"), strict=True):
            for quantile, line in (("p50", "o-"), ("p95", "--")):
                axis.plot(users, [1e3 * run[field].get(quantile, 0) for run in runs], line, label=f"{name} {quantile}")
    for axis, title in zip(axes, ("requests / s", "time to first token, ms", "gap between tokens, ms"), strict=True):
        axis.set(xlabel="users", title=title, xscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    partial = path.with_name(f".{path.name}.partial.png")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    partial.replace(path)
