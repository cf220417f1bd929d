"""Questions to answer, in the order of a schedule. Every process loads all of a step: rollouts are planned alike everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import grain

from gp_jax.data.collate import TrainSample, lengths
from gp_jax.data.record import BadRecord, Record, Source
from gp_jax.data.samples import SampleMaker
from gp_jax.data.schedule import Schedule


@dataclass(frozen=True)
class LoadedQuestions:
    """The records of a micro-batch that could be read: (source, record, sample)."""

    number: int
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
        return LoadedQuestions(number, tuple(found), tuple(bad))
