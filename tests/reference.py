"""GlimpsePrune written out in torch for one sample at a time, from the method's description; an oracle for settings that the
released goldens do not cover. Slow and literal: no padding, no buckets, no batching."""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb


@dataclass
class Reference:
    mask_logits: torch.Tensor
    keep: torch.Tensor
    positions: torch.Tensor
    first_logits: torch.Tensor
    tokens: list[int]


def see_windows(model, pixel_values, grid, layers):
    """Qwen2.5-VL: image embeddings and the merge-group means of the chosen blocks, both in raster order of merged tokens."""
    visual, seen, order = model.model.visual, {}, []
    original = visual.permute_input_for_window_attn

    def remember(tensor, window_index, seq_len):
        order[:] = [window_index]
        return original(tensor, window_index, seq_len)

    visual.permute_input_for_window_attn = remember
    hooks = [
        visual.blocks[i].register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out.reshape(-1, 4, out.shape[-1]).mean(1)))
        for i in layers
    ]
    embeds = visual(pixel_values, grid).pooler_output
    for hook in hooks:
        hook.remove()
    visual.permute_input_for_window_attn = original
    return embeds, [seen[i][torch.argsort(order[0])] for i in layers]


def look(model, batch, layers):
    """What a family does with its pictures: positions (axes, 1, L), image embeddings, conditions, grids (rows, columns), window side."""
    if "image_grid_thw" in batch:
        grid = batch["image_grid_thw"]
        positions, _ = model.model.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], grid, attention_mask=batch["attention_mask"]
        )
        embeds, conditions = see_windows(model, batch["pixel_values"], grid, layers)
        return positions, embeds, conditions, [(int(h) // 2, int(w) // 2) for _, h, w in grid], model.config.vision_config.window_size // 28
    # LLaVA-1.5: CLIP's hidden states without their class token, 0 being the embeddings; positions count on.
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    embeds = model.model.multi_modal_projector(states[-2][:, 1:])
    side = math.isqrt(embeds.shape[1])
    conditions = [states[i][:, 1:].flatten(0, 1) for i in layers]
    positions = torch.arange(batch["input_ids"].shape[1])[None, None]
    return positions, embeds.flatten(0, 1), conditions, [(side, side)] * len(embeds), side


def predict(weights, glimpse, maps, conditions, grids, window_side):
    """The predictor, image by image, window by window. Returns: (visual tokens,) logits of the last head."""
    fuser, heads, width = weights["attn_fuser"], glimpse["attn_fuse_num_heads"], glimpse["attn_fuse_size"]
    x = maps @ fuser["attn_in_proj.weight"].T + fuser["attn_in_proj.bias"]
    cells, segments = [], []
    for image, (rows, columns) in enumerate(grids):
        for r in range(rows):
            for c in range(columns):
                cells.append((r, c))
                segments.append((image, 0, 0) if glimpse["attn_fuse_global"] else (image, r // window_side, c // window_side))
    same = torch.tensor([[a == b for b in segments] for a in segments])
    for m, condition in enumerate(conditions):
        part = {k.removeprefix(f"layers.{m}."): v for k, v in fuser.items() if k.startswith(f"layers.{m}.")}
        norm = lambda h, name: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * part[f"{name}.weight"]  # noqa: B023, E731
        y = norm(x, "norm1")
        joint = y
        if glimpse["attn_fuse_type"] == "AttnFuserV1":
            joint = torch.cat([y, condition @ fuser[f"cond_in_projs.{m}.weight"].T + fuser[f"cond_in_projs.{m}.bias"]], -1)
        hd = joint.shape[-1] // heads
        frequencies = torch.tensor([10000 ** (-2 * j / (hd / 2)) for j in range(hd // 4)])
        angles = torch.stack([torch.cat([r * frequencies, c * frequencies]) for r, c in cells]).repeat(1, 2)

        def turn(h, angles=angles, hd=hd):
            h = h.reshape(len(cells), heads, hd).transpose(0, 1)
            return h * angles.cos() + torch.cat([-h[..., hd // 2 :], h[..., : hd // 2]], -1) * angles.sin()

        q, k = turn(joint @ part["attn.q_proj.weight"].T), turn(joint @ part["attn.k_proj.weight"].T)
        v = y @ part["attn.v_proj.weight"].T
        if glimpse.get("attn_fuse_use_flash_attn"):
            v = torch.cat([v, torch.ones(len(cells), joint.shape[-1] - width)], -1)
        v = v.reshape(len(cells), heads, -1).transpose(0, 1)
        scores = (q @ k.transpose(1, 2) / math.sqrt(hd)).masked_fill(~same, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(cells), -1)[:, :width]
        x = x + out @ part["attn.o_proj.weight"].T
        y = norm(x, "norm2")
        gate = F.silu(y @ part["mlp.gate_proj.weight"].T + part["mlp.gate_proj.bias"])
        up = y @ part["mlp.up_proj.weight"].T + part["mlp.up_proj.bias"]
        x = x + (gate * up) @ part["mlp.down_proj.weight"].T + part["mlp.down_proj.bias"]
    last = len(conditions) - 1
    return (x @ fuser[f"attn_out_projs.{last}.weight"].T + fuser[f"attn_out_projs.{last}.bias"])[:, 0]


def keep_rule(logits, threshold=0.5, max_remain_ratio=None, min_remain_num=1, fixed_remain_ratio=None):
    """The released rule, step by step."""
    count, probability = len(logits), logits.sigmoid()
    ranked = torch.argsort(logits, descending=True)
    keep = torch.zeros(count, dtype=torch.bool)
    if fixed_remain_ratio is not None:
        keep[ranked[: max(1, int(fixed_remain_ratio * count))]] = True
        return keep
    keep = probability > threshold
    if max_remain_ratio is not None and keep.sum().item() / count > max_remain_ratio:
        keep = torch.zeros(count, dtype=torch.bool)
        keep[ranked[: int(max_remain_ratio * count)]] = True
    if keep.sum() < (min_remain_num or 0):
        keep[ranked[:min_remain_num]] = True
    return keep


@torch.no_grad()
def run(model, glimpse, weights, batch, new_tokens=8, **rule) -> Reference:
    """One unpadded sample through glimpse, pruning and greedy decoding."""
    text, depth = model.model.language_model, model.config.text_config.num_hidden_layers
    ids = batch["input_ids"]
    positions, embeds, conditions, grids, window_side = look(model, batch, glimpse["selected_visual_layers"])
    axes = len(positions)

    def angles(position):  # rotary embeddings of one axis take (1, L)
        return text.rotary_emb(embeds, position if axes > 1 else position[0])

    hidden = text.embed_tokens(ids)
    is_image = ids[0] == model.config.image_token_id
    hidden[0, is_image] = embeds
    vectors, rows = None, 0
    if glimpse["le_layers"]:
        e = weights["learnable_embeddings"] @ weights["le_proj"]["weight"].T + weights["le_proj"]["bias"]
        if glimpse["le_norm_type"] == "layernorm":
            vectors = F.layer_norm(e, e.shape[-1:], weights["le_norm"]["weight"], weights["le_norm"]["bias"])
        else:
            eps = model.config.text_config.rms_norm_eps
            vectors = e * torch.rsqrt(e.pow(2).mean(-1, keepdim=True) + eps) * weights["le_norm"]["weight"]
        rows = glimpse["le_length"]
        hidden = torch.cat([hidden, vectors[glimpse["le_layers"].index(0)][None]], 1)
        extra = positions[:, :, -1:] + torch.arange(1, rows + 1)
        positions = torch.cat([positions, extra], 2)
    cache: list = [None] * depth

    def layer(i, h, position, tap=None):
        block, attention = text.layers[i], text.layers[i].self_attn
        y = block.input_layernorm(h)
        shape = (1, y.shape[1], -1, attention.head_dim)
        q, k, v = (f(y).view(shape).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *angles(position))
        if cache[i] is not None:
            k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
        cache[i] = (k, v)
        k, v = (x.repeat_interleave(attention.num_key_value_groups, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(attention.head_dim)
        if tap is not None:
            last = scores[0, :, -1]  # (heads, keys)
            tap.append((last if glimpse["use_attention_logits"] else last.log_softmax(-1)).T)
        future = torch.ones(scores.shape[-2:]).triu(1 + scores.shape[-1] - scores.shape[-2]).bool()
        out = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(1, y.shape[1], -1)
        h = h + attention.o_proj(out)
        return h + block.mlp(block.post_attention_layernorm(h))

    taps: dict = {}
    cut = min(glimpse["reduce_layer"], depth - 1)
    for i in range(cut + 1):
        if rows and i > 0 and i in glimpse["le_layers"]:
            hidden[0, -rows:] += vectors[glimpse["le_layers"].index(i)]
        seen: list = []
        hidden = layer(i, hidden, positions, seen if i in glimpse["selected_layers"] else None)
        if seen:
            taps[i] = seen[0][: len(is_image)][is_image]
    maps = torch.cat([taps[i] for i in glimpse["selected_layers"]], -1)
    logits = predict(weights, glimpse, maps, conditions, grids, window_side)
    keep = keep_rule(logits, **rule)
    stays = torch.ones(len(is_image) + rows, dtype=torch.bool)
    stays[len(is_image) :] = False
    stays[: len(is_image)][is_image] = keep
    hidden, positions = hidden[:, stays], positions[:, :, stays]
    for i in range(cut + 1):
        cache[i] = tuple(x[:, :, stays] for x in cache[i])
    for i in range(cut + 1, depth):
        hidden = layer(i, hidden, positions)
    first = step = model.lm_head(text.norm(hidden[:, -1]))[0]
    tokens, position = [], int(positions.max())
    for _ in range(new_tokens):
        tokens.append(int(step.argmax()))
        position += 1
        hidden = text.embed_tokens(torch.tensor([[tokens[-1]]]))
        for i in range(depth):
            hidden = layer(i, hidden, torch.full((axes, 1, 1), position))
        step = model.lm_head(text.norm(hidden[:, -1]))[0]
    return Reference(logits, keep, positions[:, 0], first, tokens)


def released_model(folder: Path) -> tuple[Qwen2_5_VLForConditionalGeneration, dict, dict]:
    """A golden Qwen2.5-VL checkpoint (flat names, transformers 4) in torch, its configuration and its glimpse's weights."""
    raw = json.loads((folder / "config.json").read_text())
    text = {k: v for k, v in raw.items() if k not in ("model_type", "vision_config", "rope_theta", "rope_scaling")}
    text["rope_parameters"] = {"rope_theta": raw["rope_theta"], **raw["rope_scaling"]}
    vision = {k: v for k, v in raw["vision_config"].items() if k not in ("model_type", "in_chans", "spatial_patch_size")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=raw["image_token_id"])
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    places = {"visual": "model.visual", "model": "model.language_model"}
    tensors = {name.split(".", 1)[0]: {} for name in (*places, "lm_head")}
    for name, tensor in load_file(folder / "model.safetensors").items():
        part, rest = name.split(".", 1)
        tensors[part][f"{places.get(part, part)}.{rest}"] = tensor
    model.load_state_dict({k: v for part in tensors.values() for k, v in part.items()}, strict=True)
    return model, raw, torch.load(folder / "new_modules_gp.pt", weights_only=True)


@contextmanager
def in_float64() -> Iterator[None]:
    """Torch code inside computes in float64: new tensors, and the casts to float32 that transformers writes out."""
    default, double = torch.get_default_dtype(), torch.float64
    with mock.patch.multiple(torch, float32=double, float=double), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        torch.set_default_dtype(double)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def run_in_float64(model, glimpse, weights, batch, **options) -> Reference:
    """`run` in float64: what the float32 numbers here, in gp_jax and in the released code are all rounded from."""

    def double(tree: dict) -> dict:
        return {k: double(v) if isinstance(v, dict) else v.double() if v.is_floating_point() else v for k, v in tree.items()}

    with in_float64():
        return run(copy.deepcopy(model).double(), glimpse, double(weights), double(batch), **options)
