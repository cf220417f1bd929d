"""The released training losses (arXiv 2508.01548, section 3.4) as sums, so that the parts of a batch add up to the batch.

B samples, U tail rows, V vocabulary, M vision slots, K supervised heads.
"""

import jax
import jax.numpy as jnp
from jax import Array

DICE_EPSILON = 1e-6


def language_sum(logits: Array, targets: Array) -> Array:
    """Cross-entropy summed over answer tokens. logits: (B, U, V) float32; targets: (B, U) int, -1: none."""
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - picked, 0))


def dice(logits: Array, reference: Array, present: Array) -> Array:
    """1 - Dice of probabilities, without squares. logits: (..., B, M), reference and present: (B, M) bool. Returns: (..., B)."""
    p, g = jnp.where(present, jax.nn.sigmoid(logits), 0), (reference & present).astype(jnp.float32)
    overlap, total = jnp.sum(p * g, axis=-1), jnp.sum(p, axis=-1) + jnp.sum(g, axis=-1)
    return 1 - (2 * overlap + DICE_EPSILON) / (total + DICE_EPSILON)


def bce(logits: Array, reference: Array, present: Array) -> Array:
    """Binary cross-entropy, mean over a sample's visual tokens. Shapes as for `dice`."""
    losses = jnp.maximum(logits, 0) - logits * reference + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    count = jnp.maximum(jnp.sum(present, axis=-1), 1)
    return jnp.sum(jnp.where(present, losses, 0), axis=-1) / count


def mask_metrics(keep: Array, reference: Array, present: Array) -> dict[str, Array]:
    """How well the kept tokens match the evidence: precision, recall, f1, iou and retention, each (B,). 0 / 0 counts as 0."""

    def share(part: Array, whole: Array) -> Array:
        return part / jnp.maximum(whole, 1)

    keep, reference = keep & present, reference & present
    hit, kept, wanted = (jnp.sum(x, axis=-1).astype(jnp.float32) for x in (keep & reference, keep, reference))
    return {
        "precision": share(hit, kept),
        "recall": share(hit, wanted),
        "f1": share(2 * hit, kept + wanted),
        "iou": share(hit, kept + wanted - hit),
        "retention": share(kept, jnp.sum(present, axis=-1)),
    }
