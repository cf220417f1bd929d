"""From what a Hugging Face processor returns to padded arrays. Everything here is numpy on the host: grids die here.

Vision slots. A sample's visual tokens are reordered so that attention windows lie in blocks of equal size: full windows first,
then the partial ones of image borders, several to a block where they fit (first-fit decreasing). Window attention is then a
reshape, the same slots serve full attention (segments = images) and the windowed predictor, and padding stays small.

    block 0: [window 0                ]   block k: [window 7 | window 9 | - -]      '-' = padding
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gp_jax.config import ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.trees import PromptInput, VisionInput


@dataclass(frozen=True)
class Sample:
    """One prompt without padding. n tokens, N visual tokens in prompt order, A position axes."""

    ids: np.ndarray  # (n,) int
    positions: np.ndarray  # (A, n) int
    image_token: np.ndarray  # (n,) int: number of the visual token, -1 for text
    grids: tuple[tuple[int, int], ...]  # (rows, columns) of visual tokens per image
    pixels: np.ndarray  # (N * merge_unit, patch_dim) float32
    slots: np.ndarray  # (M,) int: number of the visual token in every vision slot, -1 padding
    windows: np.ndarray  # (M,) int: window number inside its block, -1 padding

    @property
    def count(self) -> int:
        """Visual tokens."""
        return sum(rows * columns for rows, columns in self.grids)

    @cached_property
    def slot_of_token(self) -> np.ndarray:
        """(N,) int: vision slot of every visual token."""
        used = np.flatnonzero(self.slots >= 0)
        return used[np.argsort(self.slots[used])]

    @property
    def next_position(self) -> int:
        """Position of the first new token, on every axis."""
        return int(self.positions.max()) + 1


def pack_windows(grids: Sequence[tuple[int, int]], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Orders visual tokens by attention window.

    Args: grids: (rows, columns) per image; side: of a window, in tokens.
    Returns: slots (M,) and windows (M,) as in `Sample`; M is a multiple of side^2.
    """
    capacity, full, partial, first = side * side, [], [], 0
    for rows, columns in grids:
        tokens = np.arange(first, first + rows * columns).reshape(rows, columns)
        first += rows * columns
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                window = tokens[top : top + side, left : left + side].reshape(-1)
                (full if window.size == capacity else partial).append(window)
    blocks: list[list[np.ndarray]] = [[window] for window in full]
    free: list[int] = [0] * len(blocks)
    start = len(blocks)
    for window in sorted(partial, key=len, reverse=True):
        home = next((b for b in range(start, len(blocks)) if free[b] >= window.size), len(blocks))
        if home == len(blocks):
            blocks.append([])
            free.append(capacity)
        blocks[home].append(window)
        free[home] -= window.size
    slots = np.full((len(blocks), capacity), -1, np.int32)
    windows = np.full((len(blocks), capacity), -1, np.int32)
    for block, members in enumerate(blocks):
        joined = np.concatenate(members)
        slots[block, : joined.size] = joined
        windows[block, : joined.size] = np.repeat(np.arange(len(members)), [m.size for m in members])
    return slots.reshape(-1), windows.reshape(-1)


def token_grid(grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """(N, 3) int per visual token: image number, row, column."""
    parts = [np.stack(np.broadcast_arrays(i, *np.indices(grid)), axis=-1).reshape(-1, 3) for i, grid in enumerate(grids)]
    return np.concatenate(parts) if parts else np.zeros((0, 3), int)


def rope_positions(image_token: np.ndarray, grids: Sequence[tuple[int, int]], axes: int) -> np.ndarray:
    """Position ids of one prompt.

    With three axes (M-RoPE, arXiv 2409.12191): text counts up on all axes at once; an image's tokens share the time of its
    start and add row and column; text goes on behind the image's longer side. With one axis: 0, 1, 2, ...
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
        offsets[slots[end - 1]] = max(grid)  # counted once, behind the image's last token
    before = np.concatenate([[0], np.cumsum(offsets)[:-1]])
    return (before[None] + place).astype(np.int32)


def read_samples(
    config: ModelConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    pixel_values: np.ndarray | None,
    image_grid_thw: np.ndarray | None,
) -> list[Sample]:
    """Validates a processor's output and splits it into samples.

    Args:
        input_ids: (B, T) int, padded on any side; attention_mask: (B, T), None: no padding.
        pixel_values: (patches of all images, patch_dim); image_grid_thw: (images, 3), time, rows, columns in patches.
    Raises: GlimpseError that names the argument at fault.
    """
    ids = _array("input_ids", input_ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise GlimpseError(f"input_ids must be a non-empty (batch, length) integer array, not {ids.dtype} {ids.shape}")
    mask = np.ones(ids.shape, bool) if attention_mask is None else _array("attention_mask", attention_mask).astype(bool)
    if mask.shape != ids.shape:
        raise GlimpseError(f"attention_mask {mask.shape} does not match input_ids {ids.shape}")
    grids, merge = _grids(config, pixel_values, image_grid_thw), config.vision.spatial_merge_size
    patches = [rows * columns for rows, columns in grids]
    pixels = np.zeros((0, config.vision.patch_dim), np.float32) if pixel_values is None else np.asarray(pixel_values)
    samples, image, patch = [], 0, 0
    for row, (row_ids, row_mask) in enumerate(zip(ids, mask, strict=True)):
        kept = row_ids[row_mask]
        if kept.size == 0:
            raise GlimpseError(f"input_ids[{row}] is empty")
        if kept.min() < 0 or kept.max() >= config.text.vocab_size:
            raise GlimpseError(f"input_ids[{row}] holds ids outside 0..{config.text.vocab_size - 1}")
        if config.video_token_id is not None and (kept == config.video_token_id).any():
            raise GlimpseError(f"input_ids[{row}] holds video tokens; only images are supported")
        is_image = kept == config.image_token_id
        wanted, mine, taken = int(is_image.sum()), [], 0
        while taken < wanted and image < len(grids):
            mine.append((grids[image][0] // merge, grids[image][1] // merge))
            taken += patches[image] // config.vision.merge_unit
            image += 1
        if taken != wanted:
            raise GlimpseError(
                f"input_ids[{row}] holds {wanted} image tokens, but image_grid_thw gives {taken} for its {len(mine)} image(s)"
            )
        image_token = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
        _check_contiguous(image_token, mine, row)
        end = patch + taken * config.vision.merge_unit
        slots, windows = pack_windows(mine, config.vision.window_side)
        positions = rope_positions(image_token, mine, config.position_axes)
        samples.append(Sample(kept.astype(np.int32), positions, image_token, tuple(mine), pixels[patch:end], slots, windows))
        patch = end
    if image != len(grids):
        raise GlimpseError(f"image_grid_thw holds {len(grids)} images, but input_ids has tokens for {image} only")
    return samples


def _array(name: str, value: object) -> np.ndarray:
    """The value as a numeric array. Raises: GlimpseError naming the argument when it is ragged or of another kind."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise GlimpseError(f"{name} is not an array: its rows differ in length") from error
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise GlimpseError(f"{name} must hold numbers, not {array.dtype}")
    return array


def _grids(config: ModelConfig, pixel_values: np.ndarray | None, image_grid_thw: np.ndarray | None) -> list[tuple[int, int]]:
    """Checks pixels against grids. Returns: (rows, columns) in patches per image."""
    if (pixel_values is None) != (image_grid_thw is None):
        raise GlimpseError("pixel_values and image_grid_thw must be given together")
    if image_grid_thw is None:
        return []
    grid, pixels, merge = _array("image_grid_thw", image_grid_thw), _array("pixel_values", pixel_values), config.vision.spatial_merge_size
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype.kind not in "iu":
        raise GlimpseError(f"image_grid_thw must be (images, 3) integers, not {grid.dtype} {grid.shape}")
    for i, (time, rows, columns) in enumerate(grid.tolist()):
        if time != 1:
            raise GlimpseError(f"image_grid_thw[{i}] has {time} frames; only still images (1) are supported")
        if rows < merge or columns < merge or rows % merge or columns % merge:
            raise GlimpseError(f"image_grid_thw[{i}] = {rows} x {columns} patches is not a multiple of the {merge} x {merge} merge")
    expected = (int(grid.prod(axis=1).sum()), config.vision.patch_dim)
    if pixels.shape != expected:
        raise GlimpseError(f"pixel_values must be {expected} for this image_grid_thw, not {pixels.shape}")
    if not np.isfinite(pixels).all():
        raise GlimpseError("pixel_values holds values that are not finite")
    return [(rows, columns) for _, rows, columns in grid.tolist()]


def _check_contiguous(image_token: np.ndarray, grids: Sequence[tuple[int, int]], row: int) -> None:
    """Every image's tokens must stand together."""
    slots, first = np.flatnonzero(image_token >= 0), 0
    for rows, columns in grids:
        run = slots[first : first + rows * columns]
        if run[-1] - run[0] + 1 != run.size:
            raise GlimpseError(f"input_ids[{row}]: the {run.size} tokens of a {rows} x {columns} image do not stand together")
        first += run.size


def slots_of(patches: int, config: ModelConfig) -> int:
    """Vision slots that hold so many patches: whole attention windows."""
    window = config.vision.window_side**2
    return -(-patches // (config.vision.merge_unit * window)) * window


def vision_input(samples: Sequence[Sample], config: ModelConfig, batch: int, slots: int) -> VisionInput:
    """Pads samples to `batch` rows of `slots` vision slots. Shapes: see `trees.VisionInput`, S = slots * merge_unit."""
    unit, side = config.vision.merge_unit, config.vision.spatial_merge_size
    patches = np.zeros((batch, slots, unit, config.vision.patch_dim), np.float32)
    token = np.zeros((batch, slots, 3), np.int32)
    token[..., 0] = -1
    window = np.full((batch, slots), -1, np.int32)
    for b, sample in enumerate(samples):
        if not sample.count:
            continue
        patches[b, sample.slot_of_token] = sample.pixels.reshape(sample.count, unit, -1)
        token[b, sample.slot_of_token] = token_grid(sample.grids)
        window[b, : sample.windows.size] = sample.windows
    inner = np.stack(np.indices((side, side)), axis=-1).reshape(unit, 2)
    patch_hw = token[:, :, None, 1:] * side + inner
    return VisionInput(
        patches=patches.reshape(batch, slots * unit, -1),
        patch_hw=patch_hw.reshape(batch, slots * unit, 2).astype(np.int32),
        patch_window=np.repeat(window, unit, axis=1),
        patch_image=np.repeat(token[..., 0], unit, axis=1),
        token_hw=token[..., 1:],
        token_window=window,
        token_image=token[..., 0],
    )


def prompt_input(samples: Sequence[Sample], config: ModelConfig, batch: int, length: int, glimpse_rows: int) -> PromptInput:
    """Pads samples to `batch` rows of `length`, left-aligned, with glimpse rows behind each. See `trees.PromptInput`.

    Glimpse rows take the positions behind the prompt on all axes; their id is a placeholder (eos).
    """
    shape = (batch, length)
    ids = np.full(shape, config.pad_token_id, np.int32)
    positions = np.zeros((config.position_axes, *shape), np.int32)
    valid, image_slot, glimpse_row = np.zeros(shape, bool), np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    tap_row = np.zeros(batch, np.int32)
    for b, sample in enumerate(samples):
        n = sample.ids.size
        end = n + glimpse_rows
        ids[b, :n], positions[:, b, :n], valid[b, :end] = sample.ids, sample.positions, True
        image_slot[b, :n][sample.image_token >= 0] = sample.slot_of_token
        ids[b, n:end] = config.eos_token_ids[0] if config.eos_token_ids else config.pad_token_id
        positions[:, b, n:end] = sample.next_position + np.arange(glimpse_rows)
        glimpse_row[b, n:end] = np.arange(glimpse_rows)
        tap_row[b] = end - 1
    return PromptInput(ids, positions, valid, image_slot, glimpse_row, tap_row)
