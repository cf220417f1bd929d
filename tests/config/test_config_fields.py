"""Every field of every configuration, with values that make no sense there: a configuration or one line that names file and field."""

import copy
import dataclasses
import json
import random
from pathlib import Path

import pytest
import tiny_llava
import tiny_models
import tiny_qwen3

from gp_jax import GlimpseError, GlimpseVLM, tiny
from gp_jax.config.model import GlimpseConfig, TextConfig
from gp_jax.config.vision import DeepStackConfig, VisionConfig
from gp_jax.pretrained.hf_config import flat_hf_config, glimpse_config, model_config
from gp_jax.pretrained.llava import CLIP_NAMES

pytestmark = pytest.mark.quick

NEVER = [float("nan"), float("inf"), 10**30, 10**400, "nonsense", "", {"a": 1}, [[None]], [{}], [1e9], [float("nan")], "x" * 10_000]
ODD = [*NEVER, None, True, False, -1, 0, 1, 2, 7, 0.5, 1e-300, -5.0, 2**31, 2**40, [], {}, [True], [-1], [2**40], [1, 1], [0] * 3000]
GENERATION = {"eos_token_id": 3, "pad_token_id": 1}
BUNDLED = Path(tiny.__file__).parent / "pretrained" / "bundled" / "scenes"
SCENES = json.loads((BUNDLED / "config.json").read_text())
LLAVA = dict(rms_norm_eps=1e-5, hidden_act="silu", rope_theta=1e4, tie_word_embeddings=False)


def nested() -> dict:
    text = {name: tiny.CONFIG[name] for name in (field.name for field in dataclasses.fields(TextConfig)) if name in tiny.CONFIG}
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": [2, 3, 3]}
    rest = {name: value for name, value in tiny.CONFIG.items() if name not in (*text, "rope_scaling", "rope_theta")}
    return rest | {"text_config": text | {"rope_parameters": rope}}


def llava(**more: object) -> dict:
    vision = tiny_llava.VISION | dict(model_type="clip_vision_model", hidden_act="quick_gelu", layer_norm_eps=1e-5, num_channels=3)
    return dict(model_type="llava", vision_config=vision, **tiny_llava.GLIMPSE) | more


OWN = dict(image_token_index=tiny_llava.IMAGE, vision_feature_layer=-2, projector_hidden_act="gelu", multimodal_projector_bias=True)
QWEN3_TEXT = dict(
    vocab_size=272, rope_parameters=dict(rope_theta=5e6, rope_type="default", mrope_section=[2, 2, 2], mrope_interleaved=True)
)
ORIGINAL = dict(mm_vision_tower="tower", mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_use_im_start_end=False)
FAMILIES = {
    "flat": SCENES | {"max_remain_ratio": 0.5, "fixed_remain_ratio": 0.5, "tie_word_embeddings": False},
    "nested": nested(),
    "llava": llava(text_config=tiny_llava.TEXT | LLAVA, **OWN),
    "llava_next": llava(text_config=tiny_llava.TEXT | LLAVA, **OWN) | dict(model_type="llava_next", image_grid_pinpoints=[[56, 112]]),
    "qwen3": nested()
    | dict(model_type="qwen3_vl", text_config=tiny_qwen3.TEXT | QWEN3_TEXT, vision_config=tiny_qwen3.VISION, **tiny_qwen3.GLIMPSE),
    "original": llava(**tiny_llava.TEXT, **LLAVA, **ORIGINAL) | dict(model_type="llava_llama"),
}
OWN_DECODER = ("head_size", "qk_norm", "mrope_interleaved")  # fields of TextConfig that the other families' files do not have
GLIMPSE = [(field.name,) for field in dataclasses.fields(GlimpseConfig)]
ROPE = {"flat": ("rope_scaling",), "nested": ("text_config", "rope_parameters"), "qwen3": ("text_config", "rope_parameters")}


def read_fields(family: str) -> list[tuple[str, ...]]:
    """Where the fields are that a family reads."""
    qwen, deepstack = family in ROPE, family == "qwen3"
    inside = () if family in ("flat", "original") else ("text_config",)
    mine = ["use_sliding_window"] if family in ("flat", "nested") else ["attention_bias", "head_dim", *([] if deepstack else ["mlp_bias"])]
    skipped = ("mrope_section", "attention_bias", *OWN_DECODER, *(["rope_theta"] if family in ("nested", "qwen3") else []))
    text = [(*inside, name) for name in (*(f.name for f in dataclasses.fields(TextConfig) if f.name not in skipped), *mine)]
    tower = DeepStackConfig if deepstack else VisionConfig
    names = [f.name for f in dataclasses.fields(tower)] if qwen else [*tiny_llava.VISION, *CLIP_NAMES.values()]
    vision = [("vision_config", name) for name in names if name != "projection_dim"]
    if qwen:
        own = [("image_token_id",), ("video_token_id",), (*ROPE[family], "mrope_section"), (*ROPE[family], "rope_theta")]
        own += [(*ROPE[family], "mrope_interleaved")] if deepstack else []
    else:
        own = [(name,) for name in (ORIGINAL if family == "original" else OWN) if name != "mm_vision_tower"]
    points = [("image_grid_pinpoints",)] if family == "llava_next" else []
    whole = [("vision_config",)] if qwen else []  # CLIP's fields have defaults: an object without them is fine
    return [("model_type",), ("tie_word_embeddings",), *whole, *text, *vision, *own, *points, *GLIMPSE]


def changed(family: str, path: tuple[str, ...], value: object) -> dict:
    config = copy.deepcopy(FAMILIES[family])
    place = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return config


def load(config: dict, generation: dict = GENERATION) -> tuple:
    """As `from_pretrained` reads it, and as a save writes it."""
    model = model_config(config, generation, "folder/config.json")
    glimpse = glimpse_config(config, model, "folder/config.json")
    json.dumps(flat_hf_config(config, glimpse))
    return model, glimpse


def refusal(config: dict, generation: dict = GENERATION) -> str | None:
    """What is wrong with it, in one short line; None: it loads. Any other error than GlimpseError fails the test."""
    try:
        load(config, generation)
    except GlimpseError as error:
        words = str(error)
        assert words.startswith("folder/") and len(words) < 400 and "\n" not in words, words
        return words
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field(family):
    load(FAMILIES[family])
    for path in read_fields(family):
        for value in NEVER:
            words = refusal(changed(family, path, value))
            assert words and path[-1] in words, (path, value, words)
        for value in ODD:
            refusal(changed(family, path, value))


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_nobody_reads(family):
    """They may hold anything."""
    found = load(FAMILIES[family])
    for path in (
        ("torch_dtype",),
        ("architectures",),
        ("auto_map",),
        ("id2label",),
        ("vision_config", "initializer_range"),
        ("bos_token_id",),
    ):
        for value in ODD:
            assert load(changed(family, path, value)) == found


@pytest.mark.parametrize("family", FAMILIES)
def test_several_fields_at_once(family):
    dice, fields = random.Random(f"16 {family}"), read_fields(family)
    for _ in range(1000):
        config = copy.deepcopy(FAMILIES[family])
        for path in dice.sample(fields, dice.randint(2, 4)):
            place = config
            for name in path[:-1]:
                place = place.get(name)
                if not isinstance(place, dict):
                    break
            else:
                place[path[-1]] = dice.choice(ODD)
        generation = {name: dice.choice(ODD) for name in dice.sample(list(GENERATION), dice.randint(0, 2))}
        refusal(config, generation)


def test_generation_config():
    for name in GENERATION:
        for value in (*NEVER[:-1], -2, 2**31, 2**40, True, [3, True], [[3]], [-2]):
            words = refusal(FAMILIES["flat"], {name: value})
            assert words and words.startswith(f"folder/generation_config.json: {name}"), (name, value, words)
    for value in ODD:
        assert load(FAMILIES["flat"], {"temperature": value, "top_k": value, "do_sample": value}) == load(FAMILIES["flat"], {})


PADS = [  # eos, pad of a vocabulary of 512 -> eos, pad
    (5, None, (5,), 5),
    ([5, 6], -1, (5, 6), 5),  # as in old Llama checkpoints
    (5, 32000, (5,), 5),  # added to the tokenizer, not to the model
    (5, 0, (5,), 0),
    (-1, 0, (), 0),
    ([], None, (), 0),
]


@pytest.mark.parametrize(("eos", "pad", "ends", "padding"), PADS)
def test_ids_that_stand_for_none(eos, pad, ends, padding):
    model, _ = load(FAMILIES["flat"], {"eos_token_id": eos, "pad_token_id": pad})
    assert (model.eos_token_ids, model.pad_token_id) == (ends, padding)


SENSELESS = {
    "rope_theta=-5.0: must be at least 1": dict(rope_theta=-5.0),
    "rope_theta=0: must be at least 1": dict(rope_theta=0),
    "rms_norm_eps=0: must be at least 1e-30": dict(rms_norm_eps=0),
    "num_hidden_layers=100000: must be at most 512": dict(num_hidden_layers=100_000),
    "anchor_positions=7: must be a list": dict(anchor_positions=7),
    "tie_word_embeddings='false': must be true or false": dict(tie_word_embeddings="false"),
    "image_token_id=512 is not in the vocabulary of 512 tokens": dict(image_token_id=512),
    "video_token_id=99999 is not in the vocabulary": dict(video_token_id=99_999),
    "eos_token_id=512 is not in the vocabulary": dict(eos_token_id=[2, 512]),
    "text_config=5: must be an object": dict(text_config=5),
    "vision_config=[]: must be an object": dict(vision_config=[]),
    "mrope_section[0]=True: must be a whole number": dict(rope_scaling={"mrope_section": [True, 8, 7]}),
    "mrope_section[0]=-1: must be at least 0": dict(rope_scaling={"mrope_section": [-1, 9, 8]}),
    "hidden_act=['silu']: must be 'silu'": dict(hidden_act=["silu"]),
    "model_type={}: must be text": dict(model_type={}),
    "le_length=1000000: must be at most 1024": dict(le_length=10**6),
    "attn_fuse_size=1099511627776: must be at most 65536": dict(attn_fuse_size=2**40),
    "head width 31 ": dict(hidden_size=124),
    "fullatt_block_indexes=[3, 3] must be distinct blocks in 0..5": dict(vision_config={"fullatt_block_indexes": [3, 3]}),
    "fullatt_block_indexes=[6] must be distinct blocks in 0..5": dict(vision_config={"fullatt_block_indexes": [6]}),
    "window_size=4096 holds 256 x 256 visual tokens, supported are 32 x 32": dict(vision_config={"window_size": 4096}),
}


@pytest.mark.parametrize("words", SENSELESS)
def test_numbers_without_sense(words, tmp_path):
    edit = copy.deepcopy(SENSELESS[words])
    if isinstance(edit.get("vision_config"), dict):
        edit["vision_config"] = SCENES["vision_config"] | edit["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["flat"] | edit))
    (tmp_path / "glimpse.safetensors").symlink_to(BUNDLED / "glimpse.safetensors")
    with pytest.raises(GlimpseError) as error:
        load(json.loads((tmp_path / "config.json").read_text()), {})
    assert words in str(error.value)
    with pytest.raises(GlimpseError, match="config.json"):
        GlimpseVLM.from_pretrained(tmp_path)


TILES = {
    "image_size=4096 holds 4096 x 4096 visual tokens": dict(vision_config={"image_size": 4096, "patch_size": 1}),
    "image_grid_pinpoints makes 262160 visual tokens of a picture": dict(image_grid_pinpoints=[[56 * 128, 56 * 128]]),
    "image_grid_pinpoints holds (56, 100): both must be multiples of the tile's 56 pixels": dict(image_grid_pinpoints=[[56, 100]]),
    "image_grid_pinpoints[0]=[56]: must have a length of at least 2": dict(image_grid_pinpoints=[[56]]),
    "vision_feature_layer=-6 must be one of 5 hidden states": dict(vision_feature_layer=-6),
    "vision_feature_layer=[-2, -1]: must be a whole number": dict(vision_feature_layer=[-2, -1]),
    "image_token_index=272 is not in the vocabulary of 272 tokens": dict(image_token_index=272),
}


@pytest.mark.parametrize("words", TILES)
def test_numbers_without_sense_of_tiles(words):
    base, edit = FAMILIES["llava_next"], TILES[words]
    edit = {name: base[name] | value if isinstance(value, dict) else value for name, value in edit.items()}
    assert words in refusal(base | edit)


OUTER_AND_INNER = [
    (dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)),
    (dict(tie_word_embeddings=False), dict(tie_word_embeddings=True)),
    (dict(eos_token_id=5, vocab_size=50, hidden_size=7), dict(eos_token_id=7)),
    (dict(eos_token_id=None), dict(eos_token_id=[7, 8])),
    ({}, dict(rope_theta=5.0, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, rope_parameters={"rope_theta": 3.0})),
    ({}, dict(rope_theta=5.0, rope_parameters={"rope_theta": 3.0, "mrope_section": [1, 1, 2]})),
    ({}, dict(rms_norm_eps=None)),
]


@pytest.mark.parametrize(("outer", "inner"), OUTER_AND_INNER)
def test_layers_of_a_file_that_disagree(outer, inner):
    """Decided as transformers decides."""
    from transformers import GenerationConfig, Qwen2_5_VLConfig

    text = {name: value for name, value in tiny_models.hf_model().config.text_config.to_dict().items() if name != "layer_types"}
    whole = tiny_models.hf_model().config.to_dict() | {"text_config": {k: v for k, v in (text | inner).items() if v is not None}} | outer
    theirs = Qwen2_5_VLConfig.from_dict(copy.deepcopy(whole))
    ours = model_config(whole)
    generation = GenerationConfig.from_model_config(theirs)
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    assert ours.text.tie_word_embeddings == theirs.tie_word_embeddings and ours.eos_token_ids == tuple(ends)
    for name in ("vocab_size", "hidden_size", "rms_norm_eps", "num_key_value_heads"):
        assert getattr(ours.text, name) == getattr(theirs.text_config, name), name
    assert ours.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
