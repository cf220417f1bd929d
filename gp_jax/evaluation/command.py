"""The command line of `gp-jax eval` and `eval.py`, and the evaluation that it runs."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from gp_jax.config.files import given_path, read_config
from gp_jax.errors import GlimpseError, printable, shown, some
from gp_jax.evaluation.results import Saved, mend_predictions, merge_predictions, set_predictions_aside
from gp_jax.evaluation.settings import EvalConfig
from gp_jax.runtime.disk import kind_of, path_of, read_json, set_aside, write_text, writing
from gp_jax.runtime.exits import exit_status, saving_as
from gp_jax.runtime.lock import only_one
from gp_jax.runtime.progress import waiting

PREDICTIONS, NOTES = "predictions.jsonl", "made_with.json"


@dataclass(frozen=True)
class EvalLaunch(EvalConfig):
    """Compare ways to prune: accuracy, visual tokens kept, cost. If --out holds an evaluation already, it continues where it stopped."""

    config: Path | None = None
    """Name of a configuration (gp-jax configs lists them), or a Python file whose `evaluation` is an EvalConfig; the options below override
    it."""


def parse(argv: list[str], prog: str = "gp-jax eval") -> EvalConfig:
    """Reads the command line; the configuration file sets the defaults."""
    path = given_path(argv)
    base = EvalConfig() if path is None else read_config(path, "evaluation", (EvalConfig,))
    default = EvalLaunch(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    launch = tyro.cli(EvalLaunch, default=default, args=argv, prog=prog, config=(tyro.conf.HelptextFromCommentsOff,))
    return EvalConfig(**{f.name: getattr(launch, f.name) for f in dataclasses.fields(EvalConfig)})


def claim(out: Path, identity: dict) -> list[str]:
    """Writes down what the predictions in a folder are made with (model, settings). Returns: a message per damaged file that was renamed.

    If these notes are damaged, it is unknown what the predictions were made with, so their files are renamed too.
    Raises: GlimpseError when the predictions in the folder were made with something else.
    """
    path, said, old = out / NOTES, [], {}
    try:
        old = read_json(path, required=False)
    except GlimpseError as error:
        said.append(f"{error}; not used, it is {set_aside(path).name} now")
    if not old and (moved := set_predictions_aside(out / PREDICTIONS)):
        said.append(f"{out}: no {NOTES} says what the answers there were made with; not used, they are {some(moved)} now")
    if wrong := differences(old, identity):
        raise GlimpseError(f"{out}: holds answers made with something else ({some(wrong)}); choose another --out or delete it")
    for name in ("left_out.jsonl", "verdicts.jsonl"):
        if kind_of(out / name) in ("folder", "other"):
            said.append(f"{out / name}: is not a regular file, not used; it is {set_aside(out / name).name} now")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(identity, indent=2) + "\n")
    return said + mend_predictions(out / PREDICTIONS)


def differences(old: dict, new: dict) -> list[str]:
    """Messages about the fields of `new` that differ from `old`; of a table of digests, the names. Empty without an `old`."""
    found = []
    for name, value in new.items() if old else ():
        was = old.get(name)
        if isinstance(value, dict):
            was = was if isinstance(was, dict) else {}
            found += [f"{own} changed" for own in sorted(was.keys() & value.keys()) if was[own] != value[own]]
            found += [f"{own} is new" for own in sorted(value.keys() - was.keys())]
            found += [f"{own} is gone" for own in sorted(was.keys() - value.keys())]
        elif was != value:
            found.append(f"{name}: {shown(was)} there, {shown(value)} now")
    return found


def evaluate(config: EvalConfig) -> Path | None:
    """Runs a configuration. Returns: the path of the report; None in processes other than the first.

    Raises: GlimpseError for errors in the configuration, the model or the data, and when another process evaluates in the same folder.
    """
    config = config.check()
    with waiting("loading libraries"):
        import jax

        from gp_jax.sharding import start_processes
        from gp_jax.vlm import GlimpseVLM  # noqa: F401 (slow to import)

    start_processes(config.coordinator, config.processes, config.process)
    saved = saving_as(f"the answers so far are in {path_of(config.out) / PREDICTIONS}; the same command goes on")
    with saved, only_one(path_of(config.out), "eval.py") if jax.process_index() == 0 else contextlib.nullcontext():
        return _evaluate(config, jax.process_index() == 0)


def _evaluate(config: EvalConfig, first: bool) -> Path | None:
    import jax

    from gp_jax.evaluation.plans import make_plans
    from gp_jax.evaluation.runner import Runner
    from gp_jax.evaluation.scores import add_verdicts
    from gp_jax.evaluation.summary import summarise
    from gp_jax.evaluation.tasks import open_tasks
    from gp_jax.runtime.compilation_cache import keep_compiled
    from gp_jax.sharding import make_mesh, wait_for_all
    from gp_jax.vlm import GlimpseVLM

    keep_compiled(config.compilation_cache)
    tasks = open_tasks(config, progress=first)
    devices = jax.local_devices()[: config.devices if config.devices > 0 else None]
    if config.devices > len(devices):
        raise GlimpseError(f"devices={config.devices}: this process has {len(devices)}")
    mesh = make_mesh(data=len(devices), devices=devices) if len(devices) > 1 else None
    vlm = GlimpseVLM.from_pretrained(config.model, config.glimpse, config.dtype, mesh, adapter=config.adapter, progress=first)
    plans = make_plans(config.plans, vlm.glimpse_config, vlm.processor.shrinks, vlm.config.vision.parts)
    out = path_of(config.out)
    if first:
        for line in claim(out, config.identity()):
            print(printable(line))
        merge_predictions(out / PREDICTIONS)  # parts of a killed run must be merged before this run writes newer ones
    wait_for_all("the folder is claimed")
    if not first and not (out / NOTES).exists():
        raise GlimpseError(f"out={config.out}: the processes of a run must share this folder")
    found, saved = [], Saved(out / PREDICTIONS)
    for task in tasks:
        runner = Runner(vlm, task, out / PREDICTIONS, config.batch, saved)
        found.append((runner, runner.run(plans)))
    wait_for_all("all is answered")
    if not first:
        return None
    for runner, predictions in found:
        runner.merge()
        if not predictions:
            reasons = some(runner.left_out(predictions).values(), 2)
            raise GlimpseError(f"task '{runner.task.name}': nothing could be asked ({reasons})")
    found, notes = add_verdicts(config, found)
    return summarise(config, vlm, found, notes)


def run(config: EvalConfig) -> None:
    """Evaluates and names the report."""
    report = evaluate(config)
    if report is not None:
        print(printable(f"report: {report}"))


def main(argv: list[str], command: str = "eval.py") -> int:
    """Runs `eval.py`. Returns: the exit status."""
    return exit_status(command, lambda: run(parse(argv, command)))
