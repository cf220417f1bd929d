"""Which records a run reads, in which order and shapes: the fields `data` of `configs/*.py`."""

from dataclasses import dataclass

from gp_jax.errors import GlimpseError

SHORT_ANSWER = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class DataSource:
    """A prepared folder (`gp-jax prepare`) and how much of it a run reads."""

    path: str
    """Folder that `gp-jax prepare` wrote, may be gs://; or scenes:N, so many generated scenes. Those of some families:
    scenes:N:text,chart; of so many visual tokens: scenes:N:64-144; or both."""
    split: str = "train"
    """Split in it."""
    sampling: str = "all"
    """all, random:N, first:N or end:N records."""
    seed: int = 42
    """Of the random sampling."""
    weight: float | None = None
    """Share of this source among all that have a weight: records are repeated or left out to match. None: as they are."""
    suffix: str = ""
    """Put behind every question on a line of its own, e.g. "Answer the question using a single word or phrase." """


@dataclass(frozen=True)
class DataConfig:
    """Which records, in which order, in which shapes."""

    sources: tuple[DataSource, ...] = ()
    """What to train on."""
    validation: tuple[DataSource, ...] = ()
    """What to validate on; none: no validation."""
    own: str | None = None
    """Shorthand: one prepared folder to train on instead of `sources`; its split `val`, if it has one, is validated on."""
    seed: int = 42
    """Of the shuffling."""
    max_visual_tokens: int | None = 4096
    """Larger pictures are scaled down to this many visual tokens per picture. None: the processor's own limit."""
    released_boxes: bool = False
    """Where pictures are padded to a square, take boxes as shares of that square, as the released training of LLaVA does by mistake."""
    max_prompt: int | None = None
    """Leave out records with longer prompts, in tokens with visual ones. None: no limit."""
    max_answer: int = 512
    """Leave out records with longer answers, in tokens."""
    shapes: int = 8
    """Bucket shapes, chosen to fit the records: more means less padding and more programs to compile."""
    workers: int = 0
    """Processes that load ahead; 0: threads of this process."""
    threads: int = 4
    """Loading threads per process."""
    prefetch: int = 8
    """Micro-batches that are ready ahead."""


def parse_sampling(text: str) -> tuple[str, int]:
    """ "random:20000" -> ("random", 20000); "all" -> ("all", 0). Raises: GlimpseError on anything else."""
    kind, _, count = text.partition(":")
    if text == "all":
        return "all", 0
    if kind not in ("random", "first", "end") or not count.isdecimal() or int(count) == 0:
        raise GlimpseError(f"sampling='{text}' is not all, random:N, first:N or end:N")
    return kind, int(count)
