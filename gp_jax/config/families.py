"""The families of models that there are, one record each: to add a family, write its files and its record.

A record names everything that the folders of the package need for a family. This module is below those folders, so a record holds import
paths, which are resolved on first use: a program imports only the families that it uses.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gp_jax.errors import GlimpseError, shown

T = TypeVar("T")


@dataclass(frozen=True)
class Lazy(Generic[T]):
    """An object of a higher module, imported on demand. address: "module:name", as entry points are written."""

    address: str

    def load(self) -> T:
        """The object at the address."""
        return pkgutil.resolve_name(self.address)


@dataclass(frozen=True)
class Family:
    """What the package needs to know of a family of models.

    title:       what messages call it.
    model_types: `ModelConfig.model_type` of its models.
    file_types:  `model_type` of the `config.json` files that it reads; several families may read the same.
    needs:       a field by which its files differ from those of another family with the same type.
    key:         regular expression of a checkpoint's keys (layer numbers as "*") by which its weights are known.
    read:        (file, generation_config, what messages call the file) -> ModelConfig.
    complete:    (file, its folder) -> the file with the configs that it only refers to; None: it refers to none.
    flat:        file -> the layout that is saved beside a glimpse; None: unchanged.
    names:       `pretrained.names.Names` of its checkpoints.
    processor:   (folder, ModelConfig) -> its processor, a `processing.qwen.Processor`.
    pictures:    (vision config, image tokens, pixel_values, image_grid_thw, image_sizes) -> list of `processing.views.Picture`.
    tower:       (vision config, dtype=, rngs=) -> its vision tower with random weights, an `nnx.Module` called as `VisionTower` is.
    cost:        (vision config, workload, batch, bytes of a value, deepest hidden state read) -> `flops.Cost` of tower and of merger.
    """

    title: str
    model_types: tuple[str, ...]
    file_types: tuple[str, ...]
    key: str
    read: Lazy[Callable[[Mapping[str, Any], Mapping[str, Any], str], Any]]
    names: Lazy[Any]
    processor: Lazy[Callable[[Path, Any], Any]]
    pictures: Lazy[Callable[..., list[Any]]]
    tower: Lazy[Callable[..., Any]]
    cost: Lazy[Callable[..., tuple[Any, Any]]]
    needs: str | None = None
    complete: Lazy[Callable[[Mapping[str, Any], Path], dict[str, Any]]] | None = None
    flat: Lazy[Callable[[Mapping[str, Any]], dict[str, Any]]] | None = None


FAMILIES: tuple[Family, ...] = (
    Family(
        title="Qwen2.5-VL",
        model_types=("qwen2_5_vl",),
        file_types=("qwen2_5_vl", "qwen2_5_vl_gp"),
        key=r"visual\.blocks\.\*\.mlp\.gate_proj\.",
        read=Lazy("gp_jax.pretrained.qwen:read_model"),
        flat=Lazy("gp_jax.pretrained.qwen:flat"),
        names=Lazy("gp_jax.pretrained.names:QWEN"),
        processor=Lazy("gp_jax.processing.qwen:Processor.load"),
        pictures=Lazy("gp_jax.processing.views:read_grids"),
        tower=Lazy("gp_jax.models.vision:VisionTower"),
        cost=Lazy("gp_jax.flops:windowed_tower"),
    ),
    Family(
        title="Qwen3-VL",
        model_types=("qwen3_vl",),
        file_types=("qwen3_vl", "qwen3_vl_moe"),  # the second is refused by its own name
        key=r"visual\.deepstack_merger_list\.",
        read=Lazy("gp_jax.pretrained.qwen3:read_model"),
        names=Lazy("gp_jax.pretrained.names:QWEN3"),
        processor=Lazy("gp_jax.processing.qwen:Processor.load"),
        pictures=Lazy("gp_jax.processing.views:read_grids"),
        tower=Lazy("gp_jax.models.deepstack:DeepStackTower"),
        cost=Lazy("gp_jax.flops:deepstack_tower"),
    ),
    Family(
        title="LLaVA in its own layout (model_type llava_llama)",
        model_types=("llava_llama",),
        file_types=("llava", "llava_llama", "llava_llama_gp"),
        needs="mm_vision_tower",
        key=r"mm_projector\.",
        read=Lazy("gp_jax.pretrained.llava:read_original"),
        complete=Lazy("gp_jax.pretrained.tower:with_tower"),
        flat=Lazy("gp_jax.pretrained.llava:flat_original"),
        names=Lazy("gp_jax.pretrained.names:LLAVA_ORIGINAL"),
        processor=Lazy("gp_jax.processing.llava:OriginalLlavaProcessor.load"),
        pictures=Lazy("gp_jax.processing.views:read_tiles"),
        tower=Lazy("gp_jax.models.clip:ClipTower"),
        cost=Lazy("gp_jax.flops:clip_tower"),
    ),
    Family(
        title="LLaVA in the layout of transformers (model_type llava)",
        model_types=("llava", "llava_next"),
        file_types=("llava", "llava_next"),
        key=r"multi_modal_projector\.",
        read=Lazy("gp_jax.pretrained.llava:read_model"),
        names=Lazy("gp_jax.pretrained.names:LLAVA"),
        processor=Lazy("gp_jax.processing.llava:LlavaProcessor.load"),
        pictures=Lazy("gp_jax.processing.views:read_tiles"),
        tower=Lazy("gp_jax.models.clip:ClipTower"),
        cost=Lazy("gp_jax.flops:clip_tower"),
    ),
)


def family_of(model_type: str) -> Family:
    """The family of a `ModelConfig.model_type`. Raises: GlimpseError when there is none."""
    found = next((family for family in FAMILIES if model_type in family.model_types), None)
    if found is None:
        known = [name for family in FAMILIES for name in family.model_types]
        raise GlimpseError(f"model_type={shown(model_type)} is not one of {', '.join(known)}")
    return found
