"""Parameter names here and in checkpoints: one table per layout, used in both directions."""

import fnmatch
from dataclasses import dataclass

from gp_jax.config.model import ModelConfig


@dataclass(frozen=True)
class Rule:
    """`ours` and `theirs` are prefixes that replace each other."""

    ours: str
    theirs: str


@dataclass(frozen=True)
class Names:
    """rules: the first whose prefix matches is used. aliases: (other prefix, prefix of the rules), the first that matches is used. `nested`
    are the aliases of transformers' own module names; files with them are saved with them again."""

    rules: tuple[Rule, ...]
    nested: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ("*rotary_emb.inv_freq", "*rotary_pos_emb.inv_freq")

    def canonical(self, key: str) -> str:
        """A checkpoint key in the form of the rules."""
        pairs = self.nested + self.aliases
        return next((ours + key[len(other) :] for other, ours in pairs if key.startswith(other)), key)

    def nested_key(self, key: str) -> str:
        """A key of the rules with transformers' own module names."""
        return next((other + key[len(ours) :] for other, ours in self.nested if key.startswith(ours)), key)

    def skips(self, key: str) -> bool:
        """Whether a checkpoint key is not a parameter."""
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.ignored)


def _decoder(prefix: str, head: str) -> tuple[Rule, ...]:
    embedding = Rule("decoder.embed_tokens", f"{prefix}embed_tokens.weight")
    return (embedding, Rule("decoder.lm_head.", head), Rule("decoder.", prefix))


def _clip(tower: str, projector: tuple[str, str], line_break: str) -> tuple[Rule, ...]:
    return (
        Rule("vision.class_embedding", f"{tower}embeddings.class_embedding"),
        Rule("vision.patch_embed.weight", f"{tower}embeddings.patch_embedding.weight"),
        Rule("vision.position_embedding", f"{tower}embeddings.position_embedding.weight"),
        Rule("vision.pre_norm.", f"{tower}pre_layrnorm."),  # their spelling
        Rule("vision.post_norm.", f"{tower}post_layernorm."),
        Rule("vision.blocks.", f"{tower}encoder.layers."),
        Rule("vision.projector.fc1.", projector[0]),
        Rule("vision.projector.fc2.", projector[1]),
        Rule("vision.line_break", line_break),
    )


GLIMPSE = (Rule("predictor.", "attn_fuser."), Rule("glimpse.", ""))
QWEN = Names(
    rules=(
        Rule("vision.patch_embed.weight", "visual.patch_embed.proj.weight"),
        Rule("vision.merger.fc1.", "visual.merger.mlp.0."),
        Rule("vision.merger.fc2.", "visual.merger.mlp.2."),
        Rule("vision.", "visual."),
        *_decoder("model.", "lm_head."),
    ),
    nested=(("model.visual.", "visual."), ("model.language_model.", "model.")),
)
QWEN3 = Names(
    rules=(
        Rule("vision.patch_embed.", "visual.patch_embed.proj."),
        Rule("vision.pos_embed", "visual.pos_embed.weight"),
        Rule("vision.", "visual."),
        *_decoder("model.", "lm_head."),
    ),
    nested=QWEN.nested,
)
CLIP_BUFFERS = ("*rotary_emb.inv_freq", "*embeddings.position_ids")
TOWER = "model.vision_tower.vision_tower.vision_model."
LLAVA_ORIGINAL = Names(
    rules=(
        *_clip(TOWER, ("model.mm_projector.0.", "model.mm_projector.2."), "model.image_newline"),
        *_decoder("model.", "lm_head."),
    ),
    ignored=CLIP_BUFFERS,
)
LLAVA = Names(
    rules=(
        *_clip("vision_tower.vision_model.", ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."), "image_newline"),
        *_decoder("language_model.model.", "language_model.lm_head."),
    ),
    nested=(
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.language_model.", "language_model.model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
        ("lm_head.", "language_model.lm_head."),
    ),
    aliases=(  # transformers 5 writes the tower without `vision_model`
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("vision_tower.vision_model.", "vision_tower.vision_model."),
        ("vision_tower.", "vision_tower.vision_model."),
    ),
    ignored=CLIP_BUFFERS,
)


def names_of(config: ModelConfig) -> Names:
    """The names in checkpoints of a model's family."""
    return config.family.names.load()


def checkpoint_name(path: str, rules: tuple[Rule, ...] = GLIMPSE) -> str:
    """The checkpoint key of a dotted path here, by `rules`; by default those of a released glimpse."""
    rule = next(r for r in rules if path.startswith(r.ours))
    return rule.theirs + path[len(rule.ours) :]


def is_glimpse(path: str) -> bool:
    """Whether a parameter belongs to the glimpse (its own file, float32)."""
    return path.startswith(tuple(rule.ours for rule in GLIMPSE))
