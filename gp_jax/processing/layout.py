"""Converts the output of a Hugging Face processor to padded NumPy arrays. Image grids are not used beyond this module.

Vision slots. A sample's visual tokens are reordered so that attention windows are in blocks of equal size. The same
slots are used for full attention (segments = images) and for the windowed predictor, and padding stays small (see `windows`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gp_jax.config.model import ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.processing.views import Picture, Plot, numeric
from gp_jax.processing.windows import pack, split_windows
from gp_jax.trees import PromptInput, VisionInput


@dataclass(frozen=True)
class FirstLook:
    """What a first look at a sample's pictures has found (see `pruning.look`). N visual tokens of the whole pictures."""

    grids: tuple[tuple[int, int], ...]  # (rows, columns) of visual tokens that were looked at, per view
    logits: np.ndarray  # (N,) float32 importance, carried to the whole pictures


@dataclass(frozen=True)
class Sample:
    """One prompt without padding. n tokens, N visual tokens in prompt order, A position axes, W attention windows.

    A second look at chosen windows is a sample too: its prompt, patches and windows are some of the whole one's, at their old places.
    """

    ids: np.ndarray  # (n,) int
    positions: np.ndarray  # (A, n) int
    image_token: np.ndarray  # (n,) int: number of the visual token, -1 for text
    grids: tuple[tuple[int, int], ...]  # (rows, columns) of visual tokens per image, or view of one; of whole pictures
    tokens: np.ndarray  # (N,) int: place of every visual token among those of the grids
    pixels: np.ndarray  # (groups * merge_unit, patch_dim) float32
    groups: np.ndarray  # (M,) int: number of the patch group in every vision slot, -1 padding
    slots: np.ndarray  # (M,) int: number of the visual token in every vision slot, -1: none
    windows: np.ndarray  # (M,) int: number of the window in every vision slot, -1 padding
    places: np.ndarray  # (W, 3) int: view, row and column of every window among those of its view
    first_look: FirstLook | None = None

    @property
    def count(self) -> int:
        """Visual tokens, N."""
        return self.tokens.size

    @property
    def total(self) -> int:
        """Visual tokens of the whole pictures."""
        return sum(rows * columns for rows, columns in self.grids)

    @cached_property
    def cells(self) -> np.ndarray:
        """(N, 3) int per visual token: view, row, column."""
        return token_grid(self.grids)[self.tokens]

    @cached_property
    def slot_of_token(self) -> np.ndarray:
        """(N,) int: vision slot of every visual token."""
        used = np.flatnonzero(self.slots >= 0)
        return used[np.argsort(self.slots[used])]

    @property
    def next_position(self) -> int:
        """Position of the first new token, on every axis."""
        return int(self.positions.max()) + 1

    def on_grids(self, values: np.ndarray, elsewhere: float) -> np.ndarray:
        """Values of its visual tokens (N,) as values of all of the whole pictures; `elsewhere`: where it has none."""
        found = np.full(self.total, elsewhere, values.dtype)
        found[self.tokens] = values
        return found


def text_sample(ids: np.ndarray, positions: np.ndarray, patch_dim: int) -> Sample:
    """A prompt without pictures. ids: (n,); positions: (A, n)."""
    none, no_pixels = np.zeros(0, np.int32), np.zeros((0, patch_dim), np.float32)
    return Sample(ids, positions, np.full(ids.size, -1, np.int32), (), none, no_pixels, none, none, none, np.zeros((0, 3), np.int32))


def token_grid(grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """(N, 3) int per visual token: image number, row, column."""
    parts = [np.stack(np.broadcast_arrays(i, *np.indices(grid)), axis=-1).reshape(-1, 3) for i, grid in enumerate(grids)]
    return np.concatenate(parts) if parts else np.zeros((0, 3), int)


def rope_positions(image_token: np.ndarray, grids: Sequence[tuple[int, int]], axes: int) -> np.ndarray:
    """Position ids of one prompt.

    With three axes (M-RoPE, arXiv 2409.12191): for text all axes increase together; an image's tokens have the position of
    its start, plus row and column on these axes; text continues after the longer side of the image. With one axis: 0, 1, 2, ...
    Args: image_token: (n,) int, -1 for text. Returns: (axes, n) int32.
    """
    length = image_token.size
    if axes == 1:
        return np.arange(length, dtype=np.int32)[None]
    offsets, place = np.ones(length, np.int64), np.zeros((3, length), np.int64)
    sizes = np.array([rows * columns for rows, columns in grids], int)
    slots = np.flatnonzero(image_token >= 0)
    cells = token_grid(grids)
    place[1:, slots] = cells[:, 1:].T
    offsets[slots] = 0
    for end, grid in zip(np.cumsum(sizes), grids, strict=True):
        offsets[slots[end - 1]] = max(grid)  # added once, after the image's last token
    before = np.concatenate([[0], np.cumsum(offsets)[:-1]])
    return (before[None] + place).astype(np.int32)


MAX_SAMPLES, MAX_TOKENS = 1 << 12, 1 << 24  # of a request, padding included; larger than any ladder
ARRAYS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "image_sizes")  # what a processor returns


def read_samples(
    config: ModelConfig,
    input_ids: np.ndarray | None,
    attention_mask: np.ndarray | None,
    pixel_values: np.ndarray | None,
    image_grid_thw: np.ndarray | None = None,
    image_sizes: np.ndarray | None = None,
) -> list[Sample]:
    """Validates a processor's output and splits it into samples.

    Args:
        input_ids: (B, T) int, padded on any side, with an image token per row of a picture, or one per picture; attention_mask: (B, T),
            None: no padding.
        pixel_values, image_grid_thw, image_sizes: pictures, in the form of the model's tower (see `processing.views`).
    Raises: GlimpseError that names the argument at fault.
    """
    prompts = _prompts(config, input_ids, attention_mask)
    tokens = sum(int((prompt == config.image_token_id).sum()) for prompt in prompts)
    pictures: list[Picture] = config.family.pictures.load()(config.vision, tokens, pixel_values, image_grid_thw, image_sizes)
    one_each = tokens == len(pictures)
    samples, image = [], 0
    for row, kept in enumerate(prompts):
        is_image = kept == config.image_token_id
        wanted, mine, taken = int(is_image.sum()), [], 0
        while taken < wanted and image < len(pictures):
            mine.append(pictures[image])
            taken += 1 if one_each else mine[-1].plot.rows.size
            image += 1
        if taken != wanted:
            by, instead = config.vision.sized_by, f"; with one token per image there would be {len(pictures)} in all"
            raise GlimpseError(
                f"input_ids[{row}] holds {wanted} image tokens, but {by} gives {taken} for its {len(mine)} image(s){instead}"
            )
        if one_each:
            repeats = np.ones(kept.size, int)
            repeats[is_image] = [picture.plot.rows.size for picture in mine]
            kept, is_image = np.repeat(kept, repeats), np.repeat(is_image, repeats)
        samples.append(_sample(config, kept, is_image, mine, row))
    if image != len(pictures):
        raise GlimpseError(f"{config.vision.sized_by} holds {len(pictures)} images, but input_ids has tokens for {image} only")
    return samples


def _prompts(config: ModelConfig, input_ids: object, attention_mask: object) -> list[np.ndarray]:
    """The token ids of every sample without padding, (n,) int64 each. Raises: GlimpseError that names the argument at fault."""
    ids = numeric("input_ids", input_ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise GlimpseError(f"input_ids must be a non-empty (batch, length) integer array, not {ids.dtype} {ids.shape}")
    if len(ids) > MAX_SAMPLES or ids.size > MAX_TOKENS:
        raise GlimpseError(f"input_ids {ids.shape} holds more than {MAX_SAMPLES} samples or {MAX_TOKENS} tokens")
    mask = np.ones(ids.shape, bool) if attention_mask is None else numeric("attention_mask", attention_mask)
    if mask.shape != ids.shape:
        raise GlimpseError(f"attention_mask {mask.shape} does not match input_ids {ids.shape}")
    if not ((mask == 0) | (mask == 1)).all():
        raise GlimpseError("attention_mask must hold 1 for tokens, 0 for padding and nothing else")
    prompts = []
    for row, (row_ids, row_mask) in enumerate(zip(ids, mask, strict=True)):
        kept = row_ids[row_mask.astype(bool)]
        if kept.size == 0:
            raise GlimpseError(f"input_ids[{row}] is empty")
        if not ((kept >= 0) & (kept < config.text.vocab_size) | (kept == config.image_token_id)).all():
            raise GlimpseError(f"input_ids[{row}] holds ids outside 0..{config.text.vocab_size - 1}")
        if config.video_token_id is not None and (kept == config.video_token_id).any():
            raise GlimpseError(f"input_ids[{row}] holds video tokens; only images are supported")
        prompts.append(kept.astype(np.int64))
    return prompts


def _sample(config: ModelConfig, ids: np.ndarray, is_image: np.ndarray, pictures: Sequence[Picture], row: int) -> Sample:
    """One prompt (n,) and its pictures. row: of `input_ids`, for messages."""
    image_token, slots, first = np.full(ids.size, -1, np.int32), np.flatnonzero(is_image), 0
    groups_token = []
    for picture in pictures:
        rows, tokens = picture.plot.rows, picture.plot.tokens
        run, slots = slots[: rows.size], slots[rows.size :]
        if run[-1] - run[0] + 1 != run.size:
            height, width = picture.plot.grids[0]
            raise GlimpseError(f"input_ids[{row}]: the {run.size} tokens of a {height} x {width} image do not stand together")
        image_token[run] = np.where(rows >= 0, rows + first, -1)
        groups_token.append(np.where(tokens >= 0, tokens + first, -1))
        first += int((tokens >= 0).sum())
    grids = tuple(grid for picture in pictures for grid in picture.plot.grids)
    split, places = split_windows([grid for picture in pictures for grid in picture.plot.seen], config.vision.window_side)
    groups, windows = pack(split, config.vision.window_side)
    token_of_group = np.concatenate(groups_token) if pictures else np.zeros(0, int)
    pixels = [picture.pixels for picture in pictures] or [np.zeros((0, config.vision.patch_dim), np.float32)]
    return Sample(
        ids=np.where(ids < 0, config.pad_token_id, ids).astype(np.int32),  # an image token need not be in the vocabulary
        positions=rope_positions(image_token, grids, config.position_axes),
        image_token=image_token,
        grids=grids,
        tokens=np.arange(first),
        pixels=np.concatenate(pixels),
        groups=groups,
        slots=np.where(groups >= 0, np.append(token_of_group, -1)[groups], -1).astype(np.int32),
        windows=windows,
        places=places,
    )


def picture_samples(config: ModelConfig, sample: Sample, plots: Sequence[Plot]) -> list[Sample]:
    """Every picture of a prompt as a prompt of its own, of nothing but the picture: for a tower that sees one picture at a time.

    plots: of the pictures, in order.
    """
    found, first = [], 0
    for plot in plots:
        patches = sum(rows * columns for rows, columns in plot.seen) * config.vision.merge_unit
        picture = Picture(plot, sample.pixels[first : first + patches])
        ids = np.full(plot.rows.size, config.image_token_id, np.int64)
        found.append(_sample(config, ids, np.ones(ids.size, bool), [picture], 0))
        first += patches
    return found


def slots_of(patches: int, config: ModelConfig) -> int:
    """Vision slots of a rung of the patches ladder. Only whole attention windows are used; the remainder of the rung is not."""
    window = config.vision.window_side**2
    return patches // (config.vision.merge_unit * window) * window


def vision_input(samples: Sequence[Sample | None], config: ModelConfig, batch: int, slots: int) -> VisionInput:
    """Pads samples (None: empty) to `batch` rows of `slots` vision slots. Shapes: see `trees.VisionInput`, S = slots * merge_unit."""
    unit, side = config.vision.merge_unit, config.vision.spatial_merge_size
    patches = np.zeros((batch, slots, unit, config.vision.patch_dim), np.float32)
    token = np.zeros((batch, slots, 3), np.int32)
    token[..., 0] = -1
    window, sides = np.full((batch, slots), -1, np.int32), np.ones((batch, slots, 2), np.int32)
    for b, sample in enumerate(samples):
        if sample is None or not sample.count:
            continue
        held = np.flatnonzero(sample.groups >= 0)
        patches[b, held] = sample.pixels.reshape(-1, unit, config.vision.patch_dim)[sample.groups[held]]
        token[b, sample.slot_of_token] = sample.cells
        window[b, : sample.windows.size] = sample.windows
        sides[b, sample.slot_of_token] = np.array(sample.grids)[sample.cells[:, 0]]
    inner = np.moveaxis(np.indices((side, side)), 0, -1).reshape(unit, 2)
    patch_hw = token[:, :, None, 1:] * side + inner
    return VisionInput(
        patches=patches.reshape(batch, slots * unit, -1),
        patch_hw=patch_hw.reshape(batch, slots * unit, 2).astype(np.int32),
        patch_window=np.repeat(window, unit, axis=1),
        patch_image=np.repeat(token[..., 0], unit, axis=1),
        token_hw=token[..., 1:],
        token_window=window,
        token_image=token[..., 0],
        token_sides=sides,
    )


def prompt_input(samples: Sequence[Sample | None], config: ModelConfig, batch: int, length: int, glimpse_rows: int) -> PromptInput:
    """Pads samples (None: an empty row) to `batch` rows of `length`, left-aligned, with glimpse rows after each. See `trees.PromptInput`.

    Glimpse rows have the positions after the prompt on all axes; their id is a placeholder (eos).
    """
    shape = (batch, length)
    ids = np.full(shape, config.pad_token_id, np.int32)
    positions = np.zeros((config.position_axes, *shape), np.int32)
    valid, image_slot, glimpse_row = np.zeros(shape, bool), np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    tap_row = np.zeros(batch, np.int32)
    for b, sample in enumerate(samples):
        if sample is None:
            continue
        n = sample.ids.size
        end = n + glimpse_rows
        ids[b, :n], positions[:, b, :n], valid[b, :end] = sample.ids, sample.positions, True
        image_slot[b, :n][sample.image_token >= 0] = sample.slot_of_token
        ids[b, n:end] = config.eos_token_ids[0] if config.eos_token_ids else config.pad_token_id
        positions[:, b, n:end] = sample.next_position + np.arange(glimpse_rows)
        glimpse_row[b, n:end] = np.arange(glimpse_rows)
        tap_row[b] = end - 1
    return PromptInput(ids, positions, valid, image_slot, glimpse_row, tap_row)
