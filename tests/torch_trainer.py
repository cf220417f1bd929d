"""The training step of GlimpsePrune written out in torch with autograd, from the method's description; the oracle of training.

As the released trainer does it: glimpse rows stand between prompt and answer, the whole sequence runs through all layers, and
autograd goes back through everything behind the first glimpse row. One sample after the other, no padding; no gp_jax.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from reference import predict
from reference import see_windows as see
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

DICE_WEIGHT, BCE_WEIGHT = 1.0, 0.1


@dataclass
class Example:
    """One conversation, whose answer starts at `start`. Without images: pixel_values, image_grid_thw and reference are None."""

    input_ids: torch.Tensor  # (n,) int: prompt and answer
    start: int
    pixel_values: torch.Tensor | None = None  # (patches, patch_dim)
    image_grid_thw: torch.Tensor | None = None  # (images, 3)
    reference: torch.Tensor | None = None  # (N,) bool over visual tokens


@dataclass
class Losses:
    """lm_loss is a mean over answer tokens; dice and bce are means over samples with images, summed over supervised heads."""

    lm_loss: torch.Tensor
    dice: torch.Tensor
    bce: torch.Tensor
    loss: torch.Tensor
    mask_logits: list[torch.Tensor | None]  # per sample (heads, N)


def flat(weights: dict) -> dict[str, torch.Tensor]:
    """Nested weights as in the released file -> tensors by released name."""
    named = {}
    for module, value in weights.items():
        named |= {f"{module}.{name}": tensor for name, tensor in value.items()} if isinstance(value, dict) else {module: value}
    return named


class TorchTrainer:
    """Freezes the base model; `parameters` are trainable copies of the glimpse's weights, by released name."""

    def __init__(self, model, glimpse: dict, weights: dict, answer_in_denominator: bool = False):
        """answer_in_denominator: log-softmax maps are normalised over all keys of the sequence, as the released trainer does."""
        self.model, self.glimpse, self.answer_in_denominator = model.requires_grad_(False), glimpse, answer_in_denominator
        self.weights = {
            module: {k: v.clone().requires_grad_() for k, v in value.items()} if isinstance(value, dict) else value.clone().requires_grad_()
            for module, value in weights.items()
        }
        self.parameters = flat(self.weights)

    def vectors(self) -> torch.Tensor | None:
        """(entries of le_layers, le_length, D), None without glimpse rows."""
        if not self.glimpse["le_layers"]:
            return None
        proj, norm = self.weights["le_proj"], self.weights["le_norm"]
        e = self.weights["learnable_embeddings"] @ proj["weight"].T + proj["bias"]
        if self.glimpse["le_norm_type"] == "layernorm":
            return F.layer_norm(e, e.shape[-1:], norm["weight"], norm["bias"])
        return e * torch.rsqrt(e.pow(2).mean(-1, keepdim=True) + self.model.config.text_config.rms_norm_eps) * norm["weight"]

    def layer(self, index: int, x: torch.Tensor, turn: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A decoder layer, causal. Returns: hidden states (1, T, D), queries and keys (1, heads, T, h) after rope."""
        block = self.model.model.language_model.layers[index]
        attention, y = block.self_attn, block.input_layernorm(x)
        q, k, v = (
            f(y).view(1, y.shape[1], -1, attention.head_dim).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *turn)
        k, v = (h.repeat_interleave(attention.num_key_value_groups, 1) for h in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        return x + block.mlp(block.post_attention_layernorm(x)), q, k

    def forward(self, example: Example) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One sample. Returns: cross-entropy summed over its answer, mask logits (heads, N) or None without images."""
        text, glimpse, start, conditions = self.model.model.language_model, self.glimpse, example.start, []
        ids, vectors = example.input_ids[None], self.vectors()
        is_image = example.input_ids[:start] == self.model.config.image_token_id
        hidden = text.embed_tokens(ids)
        if example.pixel_values is not None:
            embeds, conditions = see(self.model, example.pixel_values, example.image_grid_thw, glimpse["selected_visual_layers"])
            hidden[0, :start][is_image] = embeds
        kinds = is_image[None].int()
        positions, _ = self.model.model.get_rope_index(ids[:, :start], kinds, example.image_grid_thw)
        rows = 0 if vectors is None else glimpse["le_length"]
        after = torch.arange(1, rows + ids.shape[1] - start + 1)
        positions = torch.cat([positions, positions[:, :, -1:] + after], 2)
        labels = torch.full((start + rows,), -100)
        labels = torch.cat([labels, example.input_ids[start:]])
        if rows:
            hidden = torch.cat([hidden[:, :start], vectors[glimpse["le_layers"].index(0)][None], hidden[:, start:]], 1)
        turn, look, taps = text.rotary_emb(hidden, positions), start + rows - 1, {}
        for i in range(len(text.layers)):
            if rows and i > 0 and i in glimpse["le_layers"]:
                hidden = hidden + F.pad(vectors[glimpse["le_layers"].index(i)], (0, 0, start, hidden.shape[1] - start - rows))
            hidden, q, k = self.layer(i, hidden, turn)
            if i in glimpse["selected_layers"]:
                seen = k.shape[2] if self.answer_in_denominator else look + 1
                scores = (k[0, :, :seen] @ q[0, :, look, :, None])[..., 0] / math.sqrt(k.shape[-1])  # (heads, keys)
                taps[i] = (scores if glimpse["use_attention_logits"] else scores.log_softmax(-1))[:, :start][:, is_image].T
        logits = self.model.lm_head(text.norm(hidden))[0].float()
        language = F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        if not is_image.any():
            return language, None
        return language, self.predict(torch.cat([taps[i] for i in glimpse["selected_layers"]], -1), conditions, example)

    def predict(self, maps: torch.Tensor, conditions: list, example: Example) -> torch.Tensor:
        """Logits of every supervised head, the deciding one last. A head reads what the blocks up to its own have made."""
        side = self.model.config.vision_config.window_size // 28
        grids = [(int(h) // 2, int(w) // 2) for _, h, w in example.image_grid_thw]
        blocks = len(conditions)
        heads = range(1, blocks + 1) if self.glimpse["deep_supervision"] else [blocks]
        weights = {"attn_fuser": self.weights["attn_fuser"]}
        return torch.stack([predict(weights, self.glimpse, maps, conditions[:m], grids, side) for m in heads])

    def gradients(self, examples: Sequence[Example]) -> Losses:
        """Forward and backward of a step, sample by sample; gradients are added to those of `parameters`."""
        tokens = sum(len(e.input_ids) - e.start for e in examples)
        pictures = sum(e.pixel_values is not None for e in examples)
        parts, masks = torch.zeros(3), []
        for example in examples:
            language, mask = self.forward(example)
            dice = bce = torch.zeros(())
            if mask is not None:
                p, g = mask.sigmoid(), example.reference.float()
                dice = (1 - (2 * (p * g).sum(-1) + 1e-6) / (p.sum(-1) + g.sum() + 1e-6)).sum() / pictures
                bce = F.binary_cross_entropy_with_logits(mask, g.expand_as(mask), reduction="none").mean(-1).sum() / pictures
            own = torch.stack([language / tokens, dice, bce])
            if own.requires_grad:  # without glimpse rows a sample without images teaches nothing
                (own * torch.tensor([1.0, DICE_WEIGHT, BCE_WEIGHT])).sum().backward()
            parts += own.detach()
            masks.append(None if mask is None else mask.detach())
        lm_loss, dice, bce = parts
        return Losses(lm_loss, dice, bce, lm_loss + DICE_WEIGHT * dice + BCE_WEIGHT * bce, masks)
