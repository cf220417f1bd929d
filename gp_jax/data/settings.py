"""Settings of a run's data: the fields `data` of `configs/*.py`."""

from dataclasses import dataclass

from gp_jax.errors import GlimpseError

SHORT_ANSWER = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class DataSource:
    """A prepared folder (`gp-jax prepare`) and how much of it a run reads."""

    path: str
    """Folder that `gp-jax prepare` wrote, may be gs://; or scenes:N for N generated scenes; scenes:N:text,chart: only questions of these
    families; scenes:N:64-144: only pictures with 64 to 144 visual tokens; scenes:N:text,chart:64-144: both."""
    split: str = "train"
    """Split of the folder."""
    sampling: str = "all"
    """Records to read: all, random:N, first:N or end:N (the last N)."""
    seed: int = 42
    """Seed of random:N."""
    weight: float | None = None
    """Weight of this source in a pass over the data, relative to the other sources: records are repeated or left out to match. None: every
    record once. Give every source a weight, or none."""
    suffix: str = ""
    """Text after every question, on a line of its own, e.g. "Answer the question using a single word or phrase." """
    rewards: tuple[str, ...] = ()
    """Rewards of its completions in reinforcement fine-tuning, as name or name=weight. [default: rewards.terms]"""


@dataclass(frozen=True)
class DataConfig:
    """Which records a run reads, in which order, in which shapes."""

    sources: tuple[DataSource, ...] = ()
    """Data sources to train on."""
    validation: tuple[DataSource, ...] = ()
    """Data sources to validate on; none: no validation."""
    own: str | None = None
    """A prepared folder to train on, in place of `sources`; its split `val`, if there is one, is used for validation."""
    seed: int = 42
    """Seed of the order of the records."""
    max_visual_tokens: int | None = 4096
    """Larger pictures are scaled down to this many visual tokens per picture. None: the processor's own limit."""
    looks: float = 0.0
    """Share of the records whose pictures are seen at the size of a first look, with the same evidence: one glimpse then serves both looks
    (docs/looks.md)."""
    look_shares: tuple[float, ...] = (0.25, 0.125, 0.0625)
    """Sizes of these: shares of a picture's visual tokens, one of which is drawn for every record."""
    look_least: int = 16
    """Visual tokens of these, as far as a picture has as many: never fewer."""
    released_boxes: bool = False
    """For models that pad pictures to a square: take boxes as shares of that square, as the released training of LLaVA does by mistake."""
    max_prompt: int | None = None
    """Leave out records with longer prompts; in tokens, visual tokens included. None: no limit."""
    max_answer: int = 512
    """Leave out records with longer answers; in tokens. None: no limit."""
    shapes: int = 8
    """Number of bucket shapes, which are chosen to fit the records: more shapes mean less padding and more programs to compile."""
    workers: int = 0
    """Processes that load data ahead; 0: threads of this process."""
    threads: int = 4
    """Loading threads per process."""
    prefetch: int = 8
    """Micro-batches that are loaded ahead."""


def parse_sampling(text: str) -> tuple[str, int]:
    """ "random:20000" -> ("random", 20000); "all" -> ("all", 0). Raises: GlimpseError on anything else."""
    kind, _, count = text.partition(":")
    if text == "all":
        return "all", 0
    if kind not in ("random", "first", "end") or not count.isdecimal() or int(count) == 0:
        raise GlimpseError(f"sampling='{text}' is not all, random:N, first:N or end:N")
    return kind, int(count)
