"""What `benchmarks.serve` concludes and draws."""

import statistics
from pathlib import Path


def rates(found: dict, budget: str, field: str = "per_second") -> dict[str, dict[int, float]]:
    """Requests per second (or another field) of the closed loop by contender and users, medians of the rounds."""
    values: dict[str, dict[int, list[float]]] = {}
    for run in found["loads"]:
        if run["loop"] == "closed" and run["budget"] == budget:
            values.setdefault(run["contender"], {}).setdefault(run["users"], []).append(run[field])
    return {name: {users: statistics.median(own) for users, own in by.items()} for name, by in values.items()}


def verdicts(found: dict) -> dict[str, float | str]:
    """Ratios that the goals are about."""
    args, made = found["args"], {}
    budgets = {budget: rates(found, budget) for budget in dict.fromkeys((args["kv_memory"], args["roomy"]))}
    for budget, by in budgets.items():
        for name in by.keys() & {"glimpse", "cap"} if "dense" in by else ():
            ratios = ", ".join(f"{users} users {rate / by['dense'][users]:.2f}" for users, rate in by[name].items())
            made[f"{name} / dense, caches {budget}"] = ratios
            each = rates(found, budget, "processor_each")
            spared = ", ".join(f"{users} users {each['dense'][users] / own:.2f}" for users, own in each[name].items())
            made[f"{name} / dense, caches {budget}, per second of CPU"] = spared
    for name in args["contenders"]:
        served = [rate for by in budgets.values() for rate in by.get(name, {}).values()]
        if alone := [run["per_second"] for run in found["static"] if run["contender"] == name]:
            made[f"{name} served / best static batches"] = round(max(served) / max(alone), 2)
        asked = {run["known"]: run["per_second"] for run in found["follow_ups"] if run["contender"] == name}
        if len(asked) == 2:
            made[f"{name} known / new pictures"] = round(asked[True] / asked[False], 2)
        runs = [run["stages"] for run in found["loads"] if run["contender"] == name and run["loop"] == "closed"]
        decode, host = (sum(stages[stage] for stages in runs) for stage in ("decode", "host"))
        made[f"{name} host / decode"] = round(host / decode, 3) if decode else 0.0
        if name in found["locust"]:
            made[f"{name} locust / own client"] = round(found["locust"][name] / budgets[args["roomy"]][name][args["roomy_users"]], 2)
    return made


def plot(found: dict, path: Path) -> None:
    """Requests per second, time to the first token and gap between tokens over users."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    budget = found["args"]["kv_memory"]
    for name in rates(found, budget):
        runs = [run for run in found["loads"] if (run["contender"], run["loop"], run["budget"]) == (name, "closed", budget)]
        users = [run["users"] for run in runs]
        axes[0].plot(users, [run["per_second"] for run in runs], "o-", label=name)
        for axis, field in zip(axes[1:], ("first", "gap"), strict=True):
            for quantile, line in (("p50", "o-"), ("p95", "--")):
                axis.plot(users, [1e3 * run[field].get(quantile, 0) for run in runs], line, label=f"{name} {quantile}")
    for axis, title in zip(axes, ("requests / s", "time to first token, ms", "gap between tokens, ms"), strict=True):
        axis.set(xlabel="users", title=title, xscale="log")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.tight_layout()
    partial = path.with_name(f".{path.name}.partial.png")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    partial.replace(path)
