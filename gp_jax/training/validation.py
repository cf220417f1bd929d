"""Validation: the losses without dropout, and pictures of predicted beside reference masks."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from gp_jax.data.collate import TrainSample
from gp_jax.data.feed import Placer, load
from gp_jax.data.record import Record
from gp_jax.data.samples import decode
from gp_jax.images import overlay, side_by_side
from gp_jax.report import RunLog
from gp_jax.training.build import Feed, Progress, Run
from gp_jax.training.step import Counts, TrainState

PICTURE_HEIGHT = 360
CAPTION = 44


def validate(run: Run, state: TrainState, step: int, folder: epath.Path, log: RunLog, progress: Progress) -> dict[str, float]:
    """One pass over the validation records. Returns: mean losses and mask metrics. Writes overlay pictures below `folder`."""
    feed, place = run.validation, Placer(run.mesh, run.config.batch_size)
    end = feed.schedule.epoch_end(1)
    tokens, samples = feed.schedule.counts(range(end))
    counts = Counts(np.float32(tokens), np.float32(max(1, samples)))
    totals: dict[str, float] = {}
    wanted = run.config.validation_pictures
    data = run.config.data
    for loaded in progress(load(feed.loader, 0, end, threads=data.threads, prefetch=data.prefetch, workers=0), "validating", end):
        sums, logits = run.step.evaluate(state, place(loaded.batch, loaded.first), counts)
        totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
        if wanted > 0 and jax.process_index() == 0:
            members = feed.schedule[loaded.number].members[loaded.first :]
            wanted -= draw(feed, members[:wanted], own_rows(logits), run, step, folder, log)
    log.write(step, totals, "validation")
    return totals


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch that this process holds."""
    rows = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    return np.concatenate([rows[start] for start in sorted(rows)])


def draw(feed: Feed, members: Sequence[tuple[int, int]], logits: np.ndarray, run: Run, step: int, folder: epath.Path, log: RunLog) -> int:
    """Pictures of some records. Returns: how many."""
    maker, threshold, drawn = feed.loader.maker, run.vlm.glimpse_config.reduce_threshold, 0
    target = folder / "validation" / f"step_{step:07d}"
    for (source, number), row in zip(members, logits, strict=False):
        record = feed.sources[source][number]
        sample = maker.make(record, feed.schedule.sources[source].suffix)
        if not sample.prompt.count:
            continue
        keep = 1 / (1 + np.exp(-row[sample.prompt.slot_of_token])) > threshold
        sheet = picture(record, sample, keep)
        target.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in record.id)[-80:]
        with (target / f"{drawn_so_far(target):02d}_{name}.png").open("wb") as file:
            sheet.save(file, format="PNG")
        log.picture(step, f"validation/{number}", sheet)
        drawn += 1
    return drawn


def drawn_so_far(folder: epath.Path) -> int:
    """Pictures in a folder."""
    return sum(path.name.endswith(".png") for path in folder.iterdir())


def picture(record: Record, sample: TrainSample, keep: np.ndarray) -> Image.Image:
    """Predicted beside reference masks, under question and answer."""
    tiles, first = [], 0
    for encoded, (rows, columns) in zip(record.images, sample.prompt.grids, strict=True):
        part, image = slice(first, first + rows * columns), decode(encoded, record.id)
        image.thumbnail((4 * PICTURE_HEIGHT, PICTURE_HEIGHT))
        tiles += [overlay(image, mask[part].reshape(rows, columns)) for mask in (keep, sample.reference)]
        first += rows * columns
    body = side_by_side(tiles)
    sheet = Image.new("RGB", (max(body.width, 480), body.height + CAPTION), "white")
    sheet.paste(body, (0, CAPTION))
    lines: Iterable[str] = (f"{record.question}  ->  {record.answer}", f"left: predicted, {keep.mean():.1%} kept    right: reference")
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        pen.text((6, 5 + 19 * i), line[: sheet.width // 7], fill="black", font_size=14)
    return sheet
