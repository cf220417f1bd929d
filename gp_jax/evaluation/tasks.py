"""Tasks: a task is a set of records, a prompt and the metrics of its answers.

scenes, scenes:SPLIT        the bundled benchmark (val, test, test_ood); scenes:test:400-576: pictures with that number of visual tokens
viscot:PATH                 a released Visual-CoT benchmark file, or a folder of them: one task each, called viscot:gqa and so on
FILE.jsonl, FILE.json       your own records
FOLDER, FOLDER:SPLIT        a folder that gp-jax prepare wrote; with several data sets in it one task each, called FOLDER/gqa
"""

import difflib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gp_jax.data.prepared import open_prepared
from gp_jax.data.record import Entry, Record, Source
from gp_jax.data.sources import SUFFIXES, find_files
from gp_jax.errors import GlimpseError
from gp_jax.evaluation.annotations import Annotations
from gp_jax.evaluation.metrics import anls, exact_match, token_f1, vqa_accuracy
from gp_jax.evaluation.settings import EvalConfig
from gp_jax.runtime.disk import kind_of, path_of
from gp_jax.scenes.source import DATASET, SPLIT_SEED, ScenesSource, families

METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "token_f1": token_f1,
}
JUDGE = "judge"  # the metric that a language model gives, `judge.py`

# The metric of the short answers of each Visual-CoT set; that of all other data is exact_match.
BRIEF_METRIC = {
    **dict.fromkeys(("docvqa", "infographicsvqa", "dude", "sroie"), "anls"),  # text read off documents
    **dict.fromkeys(("textvqa", "textcap"), "vqa_accuracy"),
    **dict.fromkeys(("gqa", "vsr", "cub", "openimages"), "exact_match"),  # yes, no, a noun
    **dict.fromkeys(("flickr30k", "visual7w", "v7w", "emotic"), "token_f1"),  # phrases, lists, sentences
}


def metrics_of(dataset: str, config: EvalConfig) -> tuple[str, ...]:
    """The metrics of a data set, the main one first: those of --metrics, else the default.

    Default for Visual-CoT with the free prompt: the judge if there is one, else token F1, because a sentence rarely equals a word; with
    the brief prompt: `BRIEF_METRIC`; then all other metrics. Default for other data: exact_match, and the judge if there is one.
    Raises: GlimpseError for an unknown metric, with the most similar name.
    """
    asked, judged = bool(config.judge.url), [JUDGE] * bool(config.judge.url)
    for name in config.metrics:
        if name not in METRICS and name != JUDGE:
            near = difflib.get_close_matches(name, [*METRICS, JUDGE], n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise GlimpseError(f"metric '{name}' is unknown{hint} (metrics: {', '.join([*METRICS, JUDGE])})")
        if name == JUDGE and not asked:
            raise GlimpseError("metric 'judge' needs an endpoint (--judge.url and --judge.model)")
    if config.metrics:
        return tuple(dict.fromkeys(config.metrics))
    if dataset not in BRIEF_METRIC:
        return ("exact_match", *judged)
    main = BRIEF_METRIC[dataset] if config.prompt == "brief" else JUDGE if asked else "token_f1"
    return tuple(dict.fromkeys((main, *judged, *METRICS)))


@dataclass(frozen=True)
class Task:
    """A task. suffix: text after every question, on a line of its own; metrics: the main one first."""

    name: str
    source: Source
    suffix: str = ""
    max_new_tokens: int = 24
    metrics: tuple[str, ...] = ("exact_match",)

    @cached_property
    def entries(self) -> list[Entry]:
        """The entries of the records, which are known without their pictures."""
        return self.source.entries

    def family(self, number: int) -> str:
        """The family of a record's question, for tables by family."""
        entry = self.entries[number]
        return families(entry) if entry.dataset == DATASET else entry.dataset

    def references(self, number: int) -> tuple[str, ...]:
        """The right answers of a record."""
        entry, several = self.entries[number], getattr(self.source, "references", None)
        return (several(entry.id) if several else ()) or (entry.answer,)

    def score(self, number: int, answer: str) -> dict[str, float]:
        """Scores of an answer by the task's metrics, without the judge."""
        return {name: METRICS[name](answer, self.references(number)) for name in self.metrics if name in METRICS}

    def made_from(self, number: int) -> str:
        """A digest of a record's pictures and evidence, which its entry does not contain; empty for generated records."""
        return self._made_from if isinstance(self._made_from, str) else self._made_from(self.entries[number].id)

    @cached_property
    def _made_from(self) -> str | Callable[[str], str]:
        try:
            return getattr(self.source, "made_from", "")
        except GlimpseError:  # a prepared folder whose notes are damaged: its records can still be read
            return ""

    @property
    def left_out(self) -> Mapping[str, str]:
        """The reason per row of the data that cannot be asked."""
        return getattr(self.source, "left_out", {})


class Subset:
    """A part of the records of a source."""

    def __init__(self, source: Source, numbers: Sequence[int]):
        self.source, self.name, self.numbers = source, source.name, list(numbers)
        self.entries = [source.entries[number] for number in self.numbers]

    @property
    def made_from(self) -> str:
        """The digest of the whole source."""
        return getattr(self.source, "made_from", "")

    def __getitem__(self, index: int) -> Record:
        return self.source[self.numbers[index]]


def open_tasks(config: EvalConfig, progress: bool = False) -> list[Task]:
    """Opens the tasks of a configuration. Raises: GlimpseError that names what is wrong; for an unknown task, with a similar name."""
    tasks = [task for name in config.tasks for task in _open(name, config, progress)]
    names = [task.name for task in tasks]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise GlimpseError(f"task '{doubled}' is named twice")
    for task in tasks:
        if not task.entries:
            reasons = "; ".join(f"{where}: {reason}" for where, reason in list(task.left_out.items())[:3])
            raise GlimpseError(f"task '{task.name}' has no record that can be asked" + (f" ({reasons})" if reasons else ""))
    return tasks


def _open(name: str, config: EvalConfig, progress: bool) -> list[Task]:
    def task(name: str, source: Source, dataset: str) -> Task:
        return Task(name, source, config.ending, config.max_new_tokens, metrics_of(dataset, config))

    kind, _, rest = name.partition(":")
    if kind == DATASET:
        split, _, sizes = (rest or "test").partition(":")
        between = re.fullmatch(r"(\d{1,6})-(\d{1,6})", sizes)
        if split not in SPLIT_SEED or bool(sizes) != bool(between):
            raise GlimpseError(_unknown(name, [f"{DATASET}:{other}" for other in SPLIT_SEED]))
        tokens = (int(between[1]), int(between[2])) if between else None
        return [task(name, ScenesSource(split, config.limit, config.start, seed=config.scenes_seed, tokens=tokens), DATASET)]
    if kind == "viscot":
        if not rest:
            raise GlimpseError("task 'viscot' needs a released benchmark file or a folder of them: viscot:PATH")
        files = find_files([rest])
        sources = [Annotations([path], _images(name, config), config.limit, progress=progress) for path in files]
        return [task(f"viscot:{path.stem}", source, path.stem) for path, source in zip(files, sources, strict=True)]
    if name.endswith(SUFFIXES) and kind_of(path_of(name)) == "file":
        source = Annotations([name], _images(name, config), config.limit, config.boxes, progress)
        return [task(name, source, Path(name).stem)]
    folder, split = _folder(name)
    prepared = open_prepared(folder, split)
    sets: dict[str, list[int]] = {}
    for number, entry in enumerate(prepared.entries):
        sets.setdefault(entry.dataset, []).append(number)
    only = len(sets) == 1
    return [task(name if only else f"{name}/{own}", Subset(prepared, numbers[: config.limit]), own) for own, numbers in sets.items()]


def _folder(name: str) -> tuple[str, str]:
    """Splits a name into a prepared folder and its split."""
    if "://" in name or kind_of(path_of(name) / "dataset_info.json"):
        scheme, slashes, rest = name.partition("://")
        path, _, split = rest.partition(":")
        return (f"{scheme}{slashes}{path}", split or "test") if slashes else (name, "test")
    path, _, split = name.rpartition(":")
    if path and kind_of(path_of(path)) == "folder":
        return path, split
    if kind_of(path_of(name)) == "folder":
        hint = f" (a folder of released benchmark files is viscot:{name})" if any(Path(name).glob("*.json")) else ""
        raise GlimpseError(f"task '{name}': the folder was not written by gp-jax prepare{hint}")
    parent = path_of(path or name).parent
    nearby = [str(parent / file.name) for file in itertools.islice(parent.iterdir(), 1000)] if kind_of(parent) == "folder" else []
    raise GlimpseError(_unknown(name, [DATASET, "viscot", *(f"{DATASET}:{split}" for split in SPLIT_SEED), *nearby]))


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name.partition(":")[0], known, n=1)
    hint = f", did you mean '{near[0]}'?" if near else ""
    return f"task '{name}' is unknown{hint} (tasks: scenes, scenes:SPLIT, viscot:PATH, your own FILE.jsonl, a prepared FOLDER)"


def _images(name: str, config: EvalConfig) -> str:
    if config.images is None:
        raise GlimpseError(f"task '{name}': --images is missing, the folder of the pictures")
    return config.images
