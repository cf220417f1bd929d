"""Questions to answer, in the order of a schedule. Every process loads all of a step: rollouts are planned alike everywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain

from gp_jax.data.collate import Shape, TrainSample, lengths
from gp_jax.data.record import BadRecord, Record, Source
from gp_jax.data.samples import SampleMaker
from gp_jax.data.schedule import Schedule
from gp_jax.training.build import Feed


@dataclass(frozen=True)
class Question:
    """A record with the tokens and pictures of its prompt. number: in its step."""

    record: Record
    sample: TrainSample
    source: int
    number: int


@dataclass(frozen=True)
class LoadedQuestions:
    """The records of a micro-batch that could be read: (source, record, sample)."""

    number: int
    shape: Shape
    members: tuple[tuple[int, Record, TrainSample], ...]
    bad: tuple[str, ...] = ()


class LoadQuestions(grain.transforms.Map):
    """Reads the records of a micro-batch; runs in background threads or processes. A record that cannot be read is left out."""

    def __init__(self, sources: Sequence[Source], maker: SampleMaker, schedule: Schedule):
        self.sources, self.maker, self.schedule = sources, maker, schedule

    def map(self, number: int) -> LoadedQuestions:
        planned, found, bad = self.schedule[number], [], []
        for source, index in planned.members:
            try:
                record = self.sources[source][index]
                sample = self.maker.make(record, self.schedule.sources[source].suffix)
                needs = lengths(sample.prompt.slots.size, sample.prompt.ids.size, sample.answer.size, self.maker.glimpse_rows)
                if needs.slots > planned.shape.slots or needs.prompt > planned.shape.prompt or needs.tail > planned.shape.tail:
                    raise BadRecord(f"record {record.id}: its pictures or texts are larger than the index says")
                found.append((source, record, sample))
            except BadRecord as error:
                bad.append(str(error))
        return LoadedQuestions(number, planned.shape, tuple(found), tuple(bad))


@dataclass(frozen=True)
class Together:
    """Questions of one bucket, which are answered together, and the places of those of every micro-batch."""

    questions: list[Question]
    parts: list[list[int]]


def together(loaded: Sequence[LoadedQuestions], first: int = 0) -> list[Together]:
    """The questions of a step by bucket: short prompts are not padded to long ones. first: number of the first question."""
    found: dict[Shape, Together] = {}
    for batch in loaded:
        own = found.setdefault(batch.shape, Together([], []))
        own.parts.append(list(range(len(own.questions), len(own.questions) + len(batch.members))))
        own.questions.extend(Question(record, sample, source, first + i) for i, (source, record, sample) in enumerate(batch.members))
        first += len(batch.members)
    return [own for own in found.values() if own.questions]


def steps_in(feed: Feed) -> int:
    """Groups of micro-batches in one pass over the data."""
    return -(-feed.schedule.epoch_end(1) // feed.accumulation)


def in_steps(feed: Feed) -> Iterator[list[Together]]:
    """One pass over the data, as many questions at a time as in a step."""
    end = feed.schedule.epoch_end(1)
    batches, first = feed.load(0, end), 0
    for start in range(0, end, feed.accumulation):
        loaded = [next(batches) for _ in range(min(feed.accumulation, end - start))]
        if groups := together(loaded, first):
            yield groups
        first += sum(len(batch.members) for batch in loaded)
