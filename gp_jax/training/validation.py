"""Validation: losses without dropout, and pictures of predicted and reference masks."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from gp_jax.data.collate import TrainSample
from gp_jax.data.feed import Placer
from gp_jax.data.record import BadRecord, Record
from gp_jax.errors import printable
from gp_jax.processing.images import decode, overlay, side_by_side
from gp_jax.processing.qwen import Processor
from gp_jax.runtime.disk import writing
from gp_jax.training.build import Feed, Progress, Run
from gp_jax.training.run_log import RunLog
from gp_jax.training.step import Counts, TrainState

PICTURE_HEIGHT = 360
CAPTION = 44


def validate(
    run: Run, state: TrainState, step: int, folder: epath.Path, log: RunLog, progress: Progress, stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """One pass over the validation records. Writes overlay pictures below `folder`.

    Returns: mean losses and mask metrics; None when `stopped` ended it early.
    """
    pictures = folder / "validation" / f"step_{step:07d}"
    if jax.process_index() == 0 and pictures.exists():
        with writing(pictures):
            pictures.rmtree()  # left by a run that was killed during this validation
    feed, place = run.validation, Placer(run.mesh, run.config.batch_size)
    assert feed is not None, "there are records to validate on"
    end = feed.schedule.epoch_end(1)
    tokens, samples = feed.schedule.counts(range(end))
    counts = Counts(np.float32(tokens), np.float32(max(1, samples)))
    totals: dict[str, float] = {}
    wanted = run.config.validation_pictures
    for loaded in progress(feed.load(0, end), "validating", end):
        if stopped():
            return None
        sums, logits = run.step.evaluate(state, place(loaded.batch, loaded.rows), counts)
        totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
        if wanted > 0 and jax.process_index() == 0:
            members = feed.schedule[loaded.number].members
            here = {members[row]: values for row, values in own_rows(logits).items() if row < len(members)}
            wanted -= draw(feed, dict(list(here.items())[:wanted]), run, step, folder, log, run.config.validation_pictures - wanted)
    log.write(step, totals, "validation")
    return totals


def own_rows(array: jax.Array) -> dict[int, np.ndarray]:
    """The rows of a batch that this process holds: row number -> values. Only the first axis may be split."""
    rows: dict[int, np.ndarray] = {}
    for shard in array.addressable_shards:
        rows |= dict(zip(range(array.shape[0])[shard.index[0]], np.asarray(shard.data), strict=True))
    return dict(sorted(rows.items()))


def draw(
    feed: Feed, logits: dict[tuple[int, int], np.ndarray], run: Run, step: int, folder: epath.Path, log: RunLog, first: int = 0
) -> int:
    """Writes pictures of some records, numbered from `first` (files in object stores cannot be counted). Returns: how many."""
    assert run.vlm.glimpse_config is not None, "the glimpse is trained"
    maker, threshold, drawn = feed.loader.maker, run.vlm.glimpse_config.reduce_threshold, 0
    target = folder / "validation" / f"step_{step:07d}"
    for (source, number), row in logits.items():
        try:
            record = feed.sources[source][number]
            sample = maker.make(record, feed.schedule.sources[source].suffix)
        except BadRecord:  # reported when it was loaded
            continue
        if not sample.prompt.count:
            continue
        keep = 1 / (1 + np.exp(-row[sample.prompt.slot_of_token])) > threshold
        sheet = picture(record, sample, keep, maker.processor)
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in record.id)[-80:].encode()[-200:].decode(errors="ignore")
        path = target / f"{first + drawn:02d}_{name}.png"
        with writing(path):
            target.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                sheet.save(file, format="PNG")
        log.picture(step, f"validation/{number}", sheet)
        drawn += 1
    return drawn


def picture(record: Record, sample: TrainSample, keep: np.ndarray, processor: Processor) -> Image.Image:
    """A picture of the predicted and the reference mask, with question and answer above."""
    tiles, first = [], 0
    views = [view for encoded in record.images for view in processor.views(decode(encoded, record.id))]
    views = views[:: max(1, len(views) // max(1, len(sample.prompt.grids)))]  # at the size of a first look: overviews alone
    for image, (rows, columns) in zip(views, sample.prompt.grids, strict=True):
        part = slice(first, first + rows * columns)
        if min(image.size) > 0:  # a detail view of LLaVA-NeXT may be empty for a very long picture
            image.thumbnail((4 * PICTURE_HEIGHT, PICTURE_HEIGHT))
        tiles += [overlay(image, mask[part].reshape(rows, columns)) for mask in (keep, sample.reference)]
        first += rows * columns
    body = side_by_side(tiles)
    sheet = Image.new("RGB", (max(body.width, 480), body.height + CAPTION), "white")
    sheet.paste(body, (0, CAPTION))
    lines: Iterable[str] = (f"{record.question}  ->  {record.answer}", f"left: predicted, {keep.mean():.1%} kept    right: reference")
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        pen.text((6, 5 + 19 * i), printable(line)[: sheet.width // 7], fill="black", font_size=14)
    return sheet
