"""Losses of the stages `plus` and `sft`: sums over tokens whose weights the host has computed, so that micro-batches add up to a step.

B questions, G completions of each, C tokens of a completion.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from gp_jax.inference.logprobs import EXACT, logprobs
from gp_jax.models.adapter import with_dropout, without_adapter
from gp_jax.models.lvlm import LVLM
from gp_jax.pruning.plan import Plan
from gp_jax.training.plus.settings import PolicyConfig
from gp_jax.training.step import LARGEST, Counts
from gp_jax.trees import Array, Completions, MaskedPrompt

METRICS = ("loss", "policy_loss", "kl", "entropy", "clip_share", "rollout_gap", f"{LARGEST}rollout_gap")
SFT_METRICS = ("loss", "entropy")


@register_dataclass
@dataclass(frozen=True)
class PlusBatch:
    """A micro-batch of questions with all their completions."""

    prompt: MaskedPrompt
    completions: Completions
    weight: Array  # (B, G, C) float32: of every token's loss; 0: not in the loss
    advantage: Array  # (B, G) float32
    sampled: Array  # (B, G, C) float32: the sampler's log-probability of every token
    old: Array | None  # (B, G, C) float32: the training pass's before the first update; None: this pass is that one
    number: Array  # (B,) int: number of the question in its step
    plan: Plan = dataclasses.field(metadata={"static": True})  # the cut that keeps the prompts' masks, or none
    length: int = dataclasses.field(metadata={"static": True})  # rows of the longest prompt behind the cut, and padding


def policy_terms(logp: Array, batch: PlusBatch, config: PolicyConfig) -> tuple[Array, Array]:
    """The policy loss of every token, (B, G, C), and whether its ratio is clipped. logp: (B, G, C), with gradient."""
    valid, advantage = batch.completions.valid, batch.advantage[..., None]
    old = jax.lax.stop_gradient(logp) if batch.old is None else batch.old
    log_ratio = jnp.where(valid, logp - old, 0)
    if config.loss == "gspo":
        log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    ratio = jnp.exp(log_ratio)
    bounded = jnp.clip(ratio, 1 - config.epsilon, 1 + config.epsilon_high)
    terms = -jnp.minimum(ratio * advantage, bounded * advantage)
    if config.importance_cap:
        terms = terms * jnp.minimum(jnp.exp(jnp.where(valid, jax.lax.stop_gradient(old) - batch.sampled, 0)), config.importance_cap)
    clipped = jnp.where(advantage > 0, ratio > 1 + config.epsilon_high, (ratio < 1 - config.epsilon) & (advantage < 0))
    return jnp.broadcast_to(terms, logp.shape), jnp.broadcast_to(clipped, logp.shape)


def kl_terms(logp: Array, reference: Array) -> Array:
    """The k3 estimate of the KL divergence of every token: exp(d) - d - 1 with d = reference - logp (Schulman 2020)."""
    distance = reference - logp
    return jnp.exp(distance) - distance - 1


def policy_losses(
    model: LVLM,
    batch: PlusBatch,
    counts: Counts,
    key: Array | None,
    *,
    config: PolicyConfig,
    remat: bool,
    attention: str,
) -> tuple[Array, tuple[dict[str, Array], Array]]:
    """A micro-batch's share of the loss of its step. counts: valid tokens and completions of the step, for the means of metrics.

    Returns: the loss, (metrics as sums, log-probabilities (B, G, C)).
    """
    measure = partial(logprobs, mode=config.mode, temperature=config.temperature, attention=attention, remat=remat)
    if key is not None:
        with_dropout(model, jax.random.fold_in(key, batch.number[0]))
    found = measure(model, batch.prompt, batch.completions, batch.plan, batch.length)
    with_dropout(model, None)
    logp, entropy = found[..., 0], found[..., 1]
    terms, clipped = policy_terms(logp, batch, config)
    valid = batch.completions.valid
    sums = {"policy_loss": jnp.sum(terms * batch.weight), "kl": jnp.float32(0)}
    loss = sums["policy_loss"]
    if config.beta:
        reference = measure(without_adapter(model), batch.prompt, batch.completions, batch.plan, batch.length, reference=True)[..., 0]
        kl = kl_terms(logp, jax.lax.stop_gradient(reference))
        loss = loss + config.beta * jnp.sum(kl * batch.weight)
        sums["kl"] = jnp.sum(jnp.where(valid, kl, 0)) / counts.tokens
    gap = jnp.where(valid, jnp.abs(jax.lax.stop_gradient(logp) - batch.sampled), 0)
    sums |= {
        "entropy": jnp.sum(jnp.where(valid, entropy, 0)) / counts.tokens,
        "clip_share": jnp.sum(jnp.where(valid, clipped, False)) / counts.tokens,
        "rollout_gap": jnp.sum(gap) / counts.tokens,
        f"{LARGEST}rollout_gap": jnp.max(gap),
    }
    return loss, (sums | {"loss": loss}, logp)


def answer_losses(
    model: LVLM,
    batch: PlusBatch,
    counts: Counts,
    key: Array | None,
    *,
    remat: bool,
    attention: str,
) -> tuple[Array, tuple[dict[str, Array], Array]]:
    """Cross-entropy of reference answers under the masks, mean over the answer tokens of a step. Shapes as for `policy_losses`."""
    if key is not None:
        with_dropout(model, jax.random.fold_in(key, batch.number[0]))
    found = logprobs(model, batch.prompt, batch.completions, batch.plan, batch.length, mode=EXACT, attention=attention, remat=remat)
    with_dropout(model, None)
    logp = found[..., 0]
    loss = -jnp.sum(logp * batch.weight)
    sums = {"loss": loss, "entropy": jnp.sum(found[..., 1]) / counts.tokens}
    return loss, (sums, logp)
