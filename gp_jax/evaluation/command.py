"""The command line of `eval.py`, and what it runs."""

import dataclasses
import hashlib
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
    default = Launch(**dataclasses.asdict(base))
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


def weights_digest(folder: Path) -> str:
    """Of the weights in a model or glimpse folder."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def evaluate(config: EvalConfig) -> Path:
    """Runs a configuration. Returns: the report. Raises: GlimpseError on anything wrong with it, its model or its data."""
    config = config.check()
    import jax

    from gp_jax.evaluation.plans import make_plans
    from gp_jax.evaluation.runner import SMALL_LADDERS, Runner, open_task
    from gp_jax.evaluation.summary import summarise
    from gp_jax.pretrained.files import find_folder
    from gp_jax.vlm import ALL_FILES, GlimpseVLM

    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    tasks = [open_task(name, config) for name in config.tasks]
    small = config.model == "scenes"
    vlm = GlimpseVLM.from_pretrained(config.model, config.glimpse, config.dtype, ladders=SMALL_LADDERS if small else None)
    plans, out = make_plans(config.plans, vlm.glimpse_config), Path(config.out)
    digests = [weights_digest(find_folder(name, ALL_FILES)) for name in (config.model, config.glimpse) if name]
    claim(out, config.identity() | {"weights": digests})
    runners = [Runner(vlm, task, out / "predictions.jsonl", config.batch) for task in tasks]
    found = [(runner, runner.run(plans)) for runner in runners]
    return summarise(config, vlm, found)


def main(argv: list[str]) -> int:
    """Runs `eval.py`. Returns: the exit status."""

    def body() -> int:
        print(f"report: {evaluate(parse(argv))}")
        return 0

    return exit_status("eval.py", body)
