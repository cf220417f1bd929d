"""What a compiled step of the stage `plus` needs of a chip, as text and as JSON."""

import dataclasses
import math
from dataclasses import dataclass

from gp_jax.ahead.compiling import GIB, Program
from gp_jax.ahead.passes import Request


@dataclass(frozen=True)
class Questions(Request):
    """A step of equal questions. batch: of a micro-batch; accumulation: micro-batches of a step, all of whose questions are answered
    together; group: completions of a question; after: last layer that sees every visual token, None: nothing is cut."""

    accumulation: int = 1
    group: int = 8
    after: int | None = None

    @property
    def kept(self) -> int:
        """Visual tokens that completions see."""
        return self.visual_tokens if self.after is None else int(self.retention * self.visual_tokens)


@dataclass(frozen=True)
class Phase:
    """What is on a chip in a part of a step, in bytes, beside weights and trained parameters."""

    name: str
    values: int  # what the program reads and what is kept for later programs
    temporary: int
    total: int  # weights and trained parameters too
    most: str = ""  # the program at which it is most


@dataclass(frozen=True)
class PlusFit:
    """The memory that a step needs, in bytes per chip."""

    seconds: float
    mesh: dict[str, int]
    limit: int
    questions: Questions
    lengths: dict[str, int]  # rows of a question that the programs are for
    beta: float
    rank: int
    parameters: int  # of the adapter, of all chips
    base: int
    adapter: int  # two copies: as it was at the start, which `StepPrograms.params` holds, and as it is now
    optimizer: int
    gradients: int
    phases: tuple[Phase, ...]
    layers: tuple[int, ...]  # of the models for which the update was compiled
    programs: tuple[Program, ...]  # of the rollout

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.mesh.values())

    @property
    def held(self) -> int:
        """What stays on a chip through all steps."""
        return self.base + self.adapter + self.optimizer + self.gradients

    @property
    def total(self) -> int:
        """The most that is on a chip at any time."""
        return max(phase.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether it fits the chip's memory."""
        return self.total <= self.limit


def facts(fit: PlusFit) -> dict:
    """The facts as JSON values."""
    return dataclasses.asdict(fit) | {"held": fit.held, "total": fit.total, "fits": fit.fits}


def report(fit: PlusFit) -> str:
    """The facts as text."""
    asked, mesh = fit.questions, " ".join(f"{axis}={size}" for axis, size in fit.mesh.items())
    rows = f"{fit.lengths['visual']} visual, {fit.lengths['prompt']} prompt, {fit.lengths['kept']} kept, {asked.answer_tokens} answer"
    step = f"{asked.batch} questions" + (f" x {asked.accumulation} micro-batches" if asked.accumulation > 1 else "")
    kl = f"with the KL pass (beta {fit.beta})" if fit.beta else "without a KL pass"
    if len(fit.layers) > 1:
        kl += f"; its memory computed from that of models of {', '.join(map(str, fit.layers))} layers"
    lines = [
        f"compiled for {fit.chips} chips ({mesh}) in {fit.seconds:.0f} s; rows per question: {rows}",
        f"a step: {step} x {asked.group} completions; adapter of rank {fit.rank}, {fit.parameters / 1e6:.1f} M parameters",
        f"update {kl}",
        f"HBM per chip  {fit.total / GIB:.2f} GiB of {fit.limit / GIB:.2f} GiB: {'fits' if fit.fits else 'DOES NOT FIT'}",
        "  always",
        f"    base weights               {fit.base / GIB:.2f} GiB",
        f"    adapter, twice             {fit.adapter / GIB:.2f} GiB",
        f"    optimiser, gradients       {(fit.optimizer + fit.gradients) / GIB:.2f} GiB",
    ]
    for phase in fit.phases:
        words = f" (most while '{phase.most}' runs)" if phase.most else ""
        sizes = f"{phase.values / GIB:.2f} GiB of values, {phase.temporary / GIB:.2f} GiB temporary"
        lines.append(f"  {phase.name:<11} {phase.total / GIB:.2f} GiB: {sizes}{words}")
    return "\n".join(lines)
