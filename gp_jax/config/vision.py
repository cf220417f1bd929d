"""Configurations of vision towers. All configurations have one interface, so callers never test which of them they have."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from gp_jax.config.choices import Activation
from gp_jax.config.schema import Few, Layer, Layers, Pixels, Several, Small, Width

Patch = Annotated[int, Field(ge=1, le=256)]  # pixels of its side
Pinpoint = Annotated[Several[Pixels], Field(min_length=2, max_length=2)]


@dataclass(frozen=True)
class Vision(ABC):
    """The interface of all vision tower configurations. Widths in channels.

    sized_by: the input that determines how many visual tokens pictures have. class_token: whether the tower has a class token. windowed:
    whether the tower's attention is limited to windows in some blocks; else windows are only the parts of a picture that a second look
    chooses from. overviews: whether pictures have two views each, an overview in one tile and the detail. parts: whether there are parts
    of a picture that the tower can see alone.
    """

    depth: Layers
    hidden_size: Width
    intermediate_size: Width
    num_heads: Width
    out_hidden_size: Width
    sized_by: ClassVar[str]
    class_token: ClassVar[bool] = False
    windowed: ClassVar[bool] = True

    @property
    def overviews(self) -> bool:
        return False

    @property
    def parts(self) -> bool:
        return True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    @abstractmethod
    def patch_shape(self) -> tuple[int, ...]:
        """One patch: channels, perhaps time, rows, columns."""

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch, in the order of `patch_shape`."""
        return math.prod(self.patch_shape)

    @property
    @abstractmethod
    def conditions(self) -> range:
        """What `selected_visual_layers` may name."""

    @property
    @abstractmethod
    def usual_conditions(self) -> tuple[int, ...]:
        """The released choice of `selected_visual_layers`."""

    @property
    @abstractmethod
    def usual_logits(self) -> bool:
        """The released choice of `use_attention_logits`."""

    @property
    @abstractmethod
    def watchable(self) -> tuple[int, int]:
        """A shallow block and the last one whose attention sees whole pictures, for methods that read the tower's attention."""

    @property
    @abstractmethod
    def spatial_merge_size(self) -> int:
        """Side of the square of patches that becomes one visual token."""

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2

    @property
    @abstractmethod
    def window_side(self) -> int:
        """Side of an attention window, in visual tokens."""

    @abstractmethod
    def slots_for(self, tokens: int) -> int:
        """Vision slots that hold any picture of `tokens` visual tokens."""

    @abstractmethod
    def tokens_in(self, slots: int, pictures: int = 1) -> int:
        """Visual tokens that pictures of any shape, this number of them, may have together in these vision slots."""

    @property
    def most_tokens(self) -> int | None:
        """Visual tokens of the largest pictures. None: not limited by the model."""
        return None


@dataclass(frozen=True)
class QwenVision(Vision):
    """What the towers of Qwen2.5-VL and Qwen3-VL share: pictures of any size in patches, of which squares become visual tokens."""

    patch_size: Patch = field(default=14, kw_only=True)
    temporal_patch_size: Few = field(default=2, kw_only=True)
    spatial_merge_size: Few = field(default=2, kw_only=True)
    in_channels: Few = field(default=3, kw_only=True)
    sized_by: ClassVar[str] = "image_grid_thw"

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """One patch: channels, time, rows, columns."""
        return (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)

    @property
    def conditions(self) -> range:
        """What `selected_visual_layers` may name: the output of a block, counted from 0."""
        return range(self.depth)

    @property
    def usual_logits(self) -> bool:
        """The released choice of `use_attention_logits`."""
        return True

    def slots_for(self, tokens: int) -> int:
        """Vision slots that are enough for any picture of `tokens` visual tokens. At worst a little more than half of each block is full,
        because windows that the picture's border cuts share a block only if they fit together; one more block for the rest."""
        side = self.window_side
        return -(-tokens * side // (side // 2 + 1)) // side**2 * side**2 + side**2

    def tokens_in(self, slots: int, pictures: int = 1) -> int:
        """Visual tokens that pictures of any shape, this number of them, may have together in these vision slots."""
        side = self.window_side
        return (slots - pictures * side**2) * (side // 2 + 1) // side


@dataclass(frozen=True)
class VisionConfig(QwenVision):
    """Windowed ViT of Qwen2.5-VL. Sizes in pixels where they end in `_size` of a patch or window, else in channels."""

    fullatt_block_indexes: Annotated[Several[Layer], Field(min_length=1)]
    window_size: Pixels = 112
    hidden_act: Activation = "silu"

    @property
    def usual_conditions(self) -> tuple[int, ...]:
        """The released choice: the blocks with full attention, deepest first."""
        return tuple(sorted(self.fullatt_block_indexes, reverse=True))

    @property
    def watchable(self) -> tuple[int, int]:
        """A shallow block and the last one whose attention sees whole pictures, for methods that read the tower's attention."""
        return min(self.fullatt_block_indexes), max(self.fullatt_block_indexes)

    @property
    def window_side(self) -> int:
        """Side of an attention window, in visual tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True)
class DeepStackConfig(QwenVision):
    """ViT of Qwen3-VL: full attention everywhere, learned positions that are resampled to every picture, and DeepStack (arXiv
    2406.04334): the outputs of some blocks become features that the first decoder layers add to the visual tokens.

    num_position_embeddings: of a square table. deepstack_visual_indexes: blocks counted from 0, each with a merger of its own.
    """

    patch_size: Patch = field(default=16, kw_only=True)
    num_position_embeddings: Annotated[int, Field(ge=1, le=2**20)]
    deepstack_visual_indexes: Several[Layer]
    hidden_act: Activation = "gelu_pytorch_tanh"
    windowed: ClassVar[bool] = False
    window_side: ClassVar[int] = 4

    @property
    def usual_conditions(self) -> tuple[int, ...]:
        """The last block and those of DeepStack, deepest first: 23, 17, 11, 5 of 24 in the released models."""
        return tuple(sorted({self.depth - 1, *self.deepstack_visual_indexes}, reverse=True))

    @property
    def watchable(self) -> tuple[int, int]:
        """The block at a quarter of the depth, and the last."""
        return min(self.depth // 4, self.depth - 1), self.depth - 1

    @property
    def table_side(self) -> int:
        """Side of the table of positions."""
        return math.isqrt(self.num_position_embeddings)


@dataclass(frozen=True)
class ClipConfig(Vision):
    """CLIP ViT and projector of LLaVA: square tiles of one size, each with a class token.

    select_layer: hidden state that the projector reads; 0 is what enters the first block, i what leaves the i-th.
    pinpoints: LLaVA-NeXT's (rows, columns) in pixels that a picture may be cut into tiles at; none: a picture is one tile.
    """

    select_layer: Annotated[int, Field(ge=1, le=512)]
    image_size: Pixels = 336
    patch_size: Patch = 14
    in_channels: Few = 3
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: Small = 1e-5
    projector_act: Activation = "gelu"
    projector_bias: bool = True
    pinpoints: Annotated[Several[Pinpoint], Field(max_length=256)] = ()
    sized_by: ClassVar[str] = "pixel_values"
    class_token: ClassVar[bool] = True
    spatial_merge_size: ClassVar[int] = 1

    @property
    def overviews(self) -> bool:
        return bool(self.pinpoints)

    @property
    def parts(self) -> bool:
        return self.overviews

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """One patch: channels, rows, columns."""
        return (self.in_channels, self.patch_size, self.patch_size)

    @property
    def window_side(self) -> int:
        """Side of a tile, in visual tokens: attention stays inside."""
        return self.image_size // self.patch_size

    @property
    def most_tokens(self) -> int:
        """Visual tokens of the largest pictures: the overview's tile and those of the detail."""
        details = [rows * columns // self.image_size**2 for rows, columns in self.pinpoints]
        return (1 + max(details, default=0)) * self.window_side**2

    def slots_for(self, tokens: int) -> int:
        """Whole tiles. LLaVA-1.5's pictures fill theirs; a LLaVA-NeXT picture may need all tiles even if few of their tokens are used."""
        tile = self.window_side**2
        return max(-(-tokens // tile) * tile, self.most_tokens)

    def tokens_in(self, slots: int, pictures: int = 1) -> int:
        return slots

    @property
    def conditions(self) -> range:
        """What `selected_visual_layers` may name: a hidden state, counted as `select_layer` is."""
        return range(self.depth + 1)

    @property
    def usual_conditions(self) -> tuple[int, ...]:
        """The released choice: 23, 17, 11, 5 of 24."""
        return tuple(range(self.depth - 1, 0, -max(1, self.depth // 4)))

    @property
    def usual_logits(self) -> bool:
        """The released choice of `use_attention_logits`: log-softmax."""
        return False

    @property
    def watchable(self) -> tuple[int, int]:
        """A shallow block (6 of 24, as VScan chose) and the one in front of `select_layer`."""
        return min(self.depth // 4, self.select_layer - 1), self.select_layer - 1
