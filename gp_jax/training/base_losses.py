"""Losses of the stage `base`: on answers, on what every visual token shows, and on what a question has read from a visual token.

A small model does not learn to read without the dense loss: accuracy on digits stays at chance level for tens of thousands of pictures.
The reading loss has the same role for relations: without it questions hardly attend to the visual tokens that encode the neighbours of a
shape. The heads of both losses are discarded after training.
B samples, U text rows, Q turns, M vision slots, P patches of a visual token, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gp_jax.models.lvlm import LVLM
from gp_jax.ops.layers import Linear
from gp_jax.scenes.labels import COLORS, FILLS, KINDS, NEIGHBORS
from gp_jax.scenes.questions import FAMILIES
from gp_jax.training import forward
from gp_jax.training.base_settings import BaseLossConfig
from gp_jax.training.losses import language_sum
from gp_jax.training.step import Counts
from gp_jax.trees import PackedBatch, TurnsInput

METRICS = (
    *("loss", "language", "dense", "reading", "exact"),
    *(f"exact_{family}" for family in FAMILIES),
    *(f"turns_{family}" for family in FAMILIES),
)
SHOWN = ("loss", "language", "dense", "reading", "exact", *FAMILIES)
PATCH_CLASSES = (KINDS, COLORS, FILLS)
NEIGHBOR_CLASSES = (NEIGHBORS, COLORS)
SIDES = 4
NOTHING_BESIDE = 0.5  # weight of the sides of a shape without a neighbour, which are frequent


class DenseHead(nnx.Module):
    """Predicts from a visual token the classes of its patches and of its neighbours."""

    def __init__(self, size: int, patches: int, *, rngs: nnx.Rngs):
        classes = patches * sum(PATCH_CLASSES) + SIDES * sum(NEIGHBOR_CLASSES)
        self.proj, self.patches = Linear(size, classes, bias=True, dtype=jnp.float32, rngs=rngs), patches

    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        """(B, M, D) -> logits (B, M, P, kinds + colors + fills) and (B, M, 4, kinds + colors)."""
        out = self.proj(tokens.astype(jnp.float32))
        split = self.patches * sum(PATCH_CLASSES)
        shape = out.shape[:2]
        return out[..., :split].reshape(*shape, self.patches, -1), out[..., split:].reshape(*shape, SIDES, -1)


class Pretraining(nnx.Module):
    """A model with the heads that exist during training only."""

    def __init__(self, model: LVLM, *, rngs: nnx.Rngs):
        self.model = model
        self.head = DenseHead(model.config.text.hidden_size, model.config.vision.merge_unit, rngs=rngs)
        self.reader = Linear(model.config.text.hidden_size, SIDES * sum(NEIGHBOR_CLASSES), bias=True, dtype=jnp.float32, rngs=rngs)


def weighted_cross_entropy(logits: Array, labels: Array, weights: Array) -> Array:
    """Mean cross-entropy over known labels. logits: (..., C); labels: (...) int, -1 unknown; weights: (...)."""
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None].astype(jnp.int32), axis=-1)[..., 0]
    weights = jnp.where(labels >= 0, weights, 0.0)
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def labels_loss(logits: Array, labels: Array, classes: tuple[int, ...], nothing: float) -> Array:
    """Sum of the cross-entropies of several labels.

    Args: logits: (..., sum of classes); labels: (..., len(classes)); nothing: weight of places whose first label is 0.
    """
    losses, start = [], 0
    for i, size in enumerate(classes):
        weights = jnp.where(labels[..., 0] == 0, nothing, 1.0)
        losses.append(weighted_cross_entropy(logits[..., start : start + size], labels[..., i], weights))
        start += size
    return sum(losses[1:], start=losses[0])


def dense_loss(head: DenseHead, tokens: Array, batch: PackedBatch, config: BaseLossConfig) -> Array:
    """Cross-entropy of the labels of all patches, and of all neighbours."""
    patch, neighbor = head(tokens)
    beside = labels_loss(neighbor, batch.labels.neighbor, NEIGHBOR_CLASSES, NOTHING_BESIDE)
    return labels_loss(patch, batch.labels.patch, PATCH_CLASSES, config.background_weight) + config.neighbor_weight * beside


def reading_loss(reader: Linear, rows: Array, batch: PackedBatch) -> Array:
    """Cross-entropy of the neighbours of the shape that a relation names, predicted from its question's last row. rows: (B, U, D)."""
    asked = jnp.take_along_axis(rows, batch.labels.row[..., None], axis=1).astype(jnp.float32)
    logits = reader(asked).reshape(*asked.shape[:2], SIDES, -1)
    return labels_loss(logits, batch.labels.beside, NEIGHBOR_CLASSES, NOTHING_BESIDE)


def exact_turns(logits: Array, turns: TurnsInput) -> Array:
    """Turns in which every answer token, the end included, is the most likely one: exactly those that greedy decoding answers correctly.

    Returns: (B, Q) bool.
    """
    wrong = (turns.targets >= 0) & (jnp.argmax(logits, axis=-1) != turns.targets)
    number = jnp.arange(turns.family.shape[1])
    return ~jnp.any(wrong[:, None] & (turns.turn[:, None] == number[:, None]), axis=-1) & (turns.family >= 0)


def losses(
    model: Pretraining, batch: PackedBatch, counts: Counts, key: Array | None, config: BaseLossConfig, remat: bool, attention: str
) -> tuple[Array, tuple[dict[str, Array], Array]]:
    """A micro-batch's share of the loss of its step, which is the mean over the step's `counts.samples` micro-batches.

    Returns: the loss, (its parts and exact matches as sums, exact turns (B, Q) bool).
    """
    logits, tokens, rows = forward.forward_packed(model.model, batch, remat=remat, implementation=attention, tap=config.reading_layer)
    language = language_sum(logits, batch.turns.targets) / jnp.maximum(jnp.sum(batch.turns.targets >= 0), 1)
    dense = dense_loss(model.head, tokens, batch, config)
    exact = exact_turns(logits, batch.turns)
    means = {"language": language, "dense": dense, "exact": jnp.sum(exact) / jnp.maximum(jnp.sum(batch.turns.family >= 0), 1)}
    means["reading"] = reading_loss(model.reader, rows, batch)
    means["loss"] = language + config.dense_weight * dense + config.reading_weight * means["reading"]
    sums = {name: value / counts.samples for name, value in means.items()}
    for number, family in enumerate(FAMILIES):
        own = batch.turns.family == number
        sums |= {f"exact_{family}": jnp.sum(exact & own, dtype=jnp.float32), f"turns_{family}": jnp.sum(own, dtype=jnp.float32)}
    return sums["loss"], (sums, exact)
