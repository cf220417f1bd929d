"""The command line of `eval.py`, and what it runs."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from gp_jax.config_file import exit_status, given_path, read_config
from gp_jax.errors import GlimpseError
from gp_jax.evaluation.settings import EvalConfig


@dataclass(frozen=True)
class Launch(EvalConfig):
    """Compare ways to prune: accuracy, what is kept, what it costs. An evaluation that is in --out already goes on where it stopped."""

    config: Path | None = None
    """A Python file whose `evaluation` is an EvalConfig, e.g. configs/eval_scenes.py; the options below change it."""


def parse(argv: list[str]) -> EvalConfig:
    """Reads the command line; the configuration file sets the defaults."""
    path = given_path(argv)
    base = EvalConfig() if path is None else read_config(path, "evaluation", (EvalConfig,))
    default = Launch(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    launch = tyro.cli(Launch, default=default, args=argv, prog="eval.py", config=(tyro.conf.HelptextFromCommentsOff,))
    return EvalConfig(**{f.name: getattr(launch, f.name) for f in dataclasses.fields(EvalConfig)})


def claim(out: Path, identity: dict) -> None:
    """Notes what a folder's predictions are made with. Raises: GlimpseError when those that are there were made with something else."""
    path = out / "made_with.json"
    if path.exists():
        old = json.loads(path.read_text())
        wrong = [f"{name}: {old.get(name)!r} there, {value!r} now" for name, value in identity.items() if old.get(name) != value]
        if wrong:
            raise GlimpseError(f"{out}: holds predictions made with other settings ({'; '.join(wrong)}); choose another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(".made_with.partial")
    scratch.write_text(json.dumps(identity, indent=2) + "\n")
    scratch.replace(path)


def evaluate(config: EvalConfig) -> Path | None:
    """Runs a configuration. Returns: the report; None in processes other than the first.

    Raises: GlimpseError on anything wrong with it, its model or its data.
    """
    config = config.check()
    import jax

    from gp_jax.compiled import keep_compiled
    from gp_jax.evaluation.plans import make_plans
    from gp_jax.evaluation.results import merge_predictions
    from gp_jax.evaluation.runner import Runner
    from gp_jax.evaluation.scores import add_verdicts
    from gp_jax.evaluation.summary import summarise
    from gp_jax.evaluation.tasks import open_tasks
    from gp_jax.pretrained.files import find_folder, weights_digest
    from gp_jax.sharding import make_mesh, start_processes, wait_for_all
    from gp_jax.vlm import ALL_FILES, GlimpseVLM

    start_processes(config.coordinator, config.processes, config.process)
    first = jax.process_index() == 0
    keep_compiled(config.compilation_cache)
    tasks = open_tasks(config, progress=first)
    devices = jax.local_devices()[: config.devices if config.devices > 0 else None]
    if config.devices > len(devices):
        raise GlimpseError(f"devices={config.devices}: this process has {len(devices)}")
    options = dict(mesh=make_mesh(data=len(devices), devices=devices)) if len(devices) > 1 else {}
    vlm = GlimpseVLM.from_pretrained(config.model, config.glimpse, config.dtype, **options)
    plans, out = make_plans(config.plans, vlm.glimpse_config, vlm.processor.shrinks), Path(config.out)
    digests = [weights_digest(find_folder(name, ALL_FILES)) for name in (config.model, config.glimpse) if name]
    identity = config.identity() | {"weights": digests}
    if first:
        claim(out, identity)
        merge_predictions(out / "predictions.jsonl")  # a killed run's parts: what is answered from here on is newer than all of them
    wait_for_all("the folder is claimed")
    if not first and not (out / "made_with.json").exists():
        raise GlimpseError(f"out={config.out}: the processes of a run must share this folder")
    found = []
    for task in tasks:
        runner = Runner(vlm, task, out / "predictions.jsonl", config.batch)
        found.append((runner, runner.run(plans)))
    wait_for_all("all is answered")
    if not first:
        return None
    for runner, predictions in found:
        runner.merge()
        if not predictions:
            raise GlimpseError(f"task '{runner.task.name}': nothing could be asked ({'; '.join(list(runner.broken.values())[:2])})")
    found, notes = add_verdicts(config, found)
    return summarise(config, vlm, found, notes)


def main(argv: list[str]) -> int:
    """Runs `eval.py`. Returns: the exit status."""

    def body() -> int:
        report = evaluate(parse(argv))
        if report is not None:
            print(f"report: {report}")
        return 0

    return exit_status("eval.py", body)
