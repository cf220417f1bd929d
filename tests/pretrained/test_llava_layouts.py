"""The layout of LLaVA's own code: towers that are only named, files of torch.save, padded squares, vicuna_v1, boxes on the square."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import tiny_llava as tiny
import torch
from PIL import Image
from safetensors.numpy import load_file

from gp_jax import GlimpseError, GlimpseVLM, Prune
from gp_jax.ahead.artifact.write import write_processor
from gp_jax.data.masks import evidence
from gp_jax.data.record import Entry, Record
from gp_jax.data.samples import SampleMaker
from gp_jax.pretrained.hf_config import glimpse_config, model_config
from gp_jax.pretrained.known import SIZES
from gp_jax.processing.table import load_processor

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def model():
    return tiny.hf_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return tiny.save_original(tmp_path_factory.mktemp("original"), model)


@pytest.fixture(scope="module")
def vlm(folder):
    return GlimpseVLM.from_pretrained(folder, glimpse=tiny.save_glimpse(folder / "glimpse"), ladders=tiny.LADDERS)


def weights(vlm) -> dict[str, np.ndarray]:
    from flax import nnx

    from gp_jax.pretrained.params import flat_params

    return {path: np.asarray(value) for path, value in flat_params(nnx.state((vlm.model.vision, vlm.model.decoder), nnx.Param)).items()}


@pytest.mark.parametrize("where", ["in the folder", "by its last name", "beside it", "in the Hub's cache", "torch", "torch in shards"])
def test_wherever_the_tower_is(model, vlm, tmp_path, monkeypatch, where):
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.save_original(folder, model, tower="openai/clip-tiny" if where != "in the folder" else "tower", inside="torch" in where)
    if where == "by its last name":
        (folder / "openai" / "clip-tiny").rename(folder / "clip-tiny")
    elif where == "beside it":
        (folder / "openai").rename(tmp_path / "openai")
    elif where == "in the Hub's cache":
        snapshot = tmp_path / "hub" / "models--openai--clip-tiny"
        (snapshot / "refs").mkdir(parents=True)
        (snapshot / "refs" / "main").write_text("a" * 40)
        (snapshot / "snapshots").mkdir()
        (folder / "openai" / "clip-tiny").rename(snapshot / "snapshots" / ("a" * 40))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    elif "torch" in where:
        tensors = {name: torch.tensor(value) for name, value in load_file(folder / "model.safetensors").items()}
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        if "shards" in where:
            parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
            index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            parts = {"pytorch_model.bin": names}
        for file, own in parts.items():
            torch.save({name: tensors[name] for name in own}, folder / file)
    found = GlimpseVLM.from_pretrained(folder, ladders=tiny.LADDERS)
    assert found.config == vlm.config
    for (path, ours), theirs in zip(weights(found).items(), weights(vlm).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=path)


def test_a_tower_that_is_nowhere_and_one_that_is_known(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "lost", ignore=shutil.ignore_patterns("hf", "vision_tower"))
    with pytest.raises(GlimpseError, match="config.json: mm_vision_tower: vision_tower: no such folder"):
        GlimpseVLM.from_pretrained(tmp_path / "lost")
    from gp_jax.pretrained.tower import with_tower

    config = json.loads((folder / "config.json").read_text()) | {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "hidden_size": 4096,
    }
    vision = model_config(with_tower(config | {"num_attention_heads": 32, "num_key_value_heads": 32}, tmp_path)).vision
    assert vision == SIZES["llava-1.5-7b"].vision


def test_both_layouts_are_the_same_model(model, vlm, tmp_path):
    other = GlimpseVLM.from_pretrained(tiny.save_hf(tmp_path / "hf", model), ladders=tiny.LADDERS)
    for ours, theirs in zip(weights(vlm).values(), weights(other).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert other.config.vision == vlm.config.vision and other.config.text == vlm.config.text


def test_save_and_load_again(vlm, tmp_path):
    vlm.save_pretrained(tmp_path / "saved")
    again = GlimpseVLM.from_pretrained(tmp_path / "saved", ladders=tiny.LADDERS)
    assert again.config == vlm.config and again.glimpse_config == vlm.glimpse_config
    theirs, ours = load_file(vlm.folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert again.processor.image_processor.do_pad
    vlm.save_glimpse(tmp_path / "glimpse")
    saved = torch.load(tmp_path / "glimpse" / "new_modules_gp.pt", weights_only=True)
    for name, value in torch.load(vlm.folder / "glimpse" / "new_modules_gp.pt", weights_only=True)["attn_fuser"].items():
        assert torch.equal(saved["attn_fuser"][name], value)
    assert json.loads((tmp_path / "glimpse" / "config.json").read_text())["model_type"] == "llava_llama_gp"


def test_an_export_takes_the_towers_processor_file_along(model, tmp_path):
    """`artifact_inputs` reads the exported folder alone; the model's own has no preprocessor_config.json."""
    folder = tiny.save_original(tmp_path / "model", model, inside=False)
    assert not (folder / "preprocessor_config.json").exists()
    vlm = GlimpseVLM.from_pretrained(folder, ladders=tiny.LADDERS)
    write_processor(vlm, tmp_path / "processor")
    again, photo = load_processor(tmp_path / "processor", vlm.config), tiny.photo(90, 60)
    np.testing.assert_array_equal(again.arrays([photo])["pixel_values"], vlm.processor.arrays([photo])["pixel_values"])
    assert (tmp_path / "processor" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("size", [(90, 60), (41, 133), (70, 70)], ids=str)
def test_pictures_are_padded_to_a_square_with_the_mean_colour(vlm, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip, picture = CLIPImageProcessorPil(**tiny.clip_settings()), tiny.photo(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in clip.image_mean))
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    theirs = np.asarray(clip(images=square, return_tensors="np")["pixel_values"])
    np.testing.assert_allclose(vlm.processor.arrays([picture])["pixel_values"], theirs, atol=1e-6)


def test_prompts_are_vicuna_v1(vlm):
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers"
    )
    text = vlm.processor.chat(1, "Who?")
    assert text == f"{system} to the user's questions. USER: <image>\nWho? ASSISTANT:"
    ids = vlm.processor.tokenize([text])[0]
    assert ids[0] == tiny.BOS and ids.count(-200) == 1 and tiny.BOS not in ids[1:]
    tokenizer = vlm.processor.tokenizer
    assert tokenizer.decode(ids[1 : ids.index(-200)]) + "<image>" + tokenizer.decode(ids[ids.index(-200) + 1 :]) == text
    assert len(vlm.processor.tokenize([vlm.processor.chat(0, "Who?")])[0]) == len(vlm.processor.chat(0, "Who?")) + 1
    with pytest.raises(GlimpseError, match="the question holds the image placeholder <image>"):
        vlm.processor([[tiny.photo(60, 60)]], ["What is <image>?"])


def test_image_tokens_one_each_or_one_a_row(vlm):
    """As the released code takes them and as they are expanded; text alone, several pictures, all in one batch."""
    own = [[tiny.photo(90, 60)], [], [tiny.photo(50, 80), tiny.photo(60, 60)]]
    expanded = vlm.processor(own, ["Who?", "Why is it?", "What?"]).inputs
    rows = [vlm.processor.tokenize([vlm.processor.chat(len(i), q)])[0] for i, q in zip(own, ["Who?", "Why is it?", "What?"], strict=True)]
    length = max(map(len, rows))
    ids, mask = np.full((3, length), tiny.PAD), np.zeros((3, length), int)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, 1
    for prune in (None, Prune(fixed_remain_ratio=0.4)):
        options = dict(prune=prune, max_new_tokens=6, eos_token_id=None)
        one = vlm.generate(input_ids=ids, attention_mask=mask, pixel_values=expanded["pixel_values"], **options)
        many = vlm.generate(**expanded, **options)
        np.testing.assert_array_equal(one.tokens, many.tokens)
    with pytest.raises(GlimpseError, match="pixel_values holds 3 images, but input_ids has tokens for 1 only"):
        vlm.generate(input_ids=ids[:1], attention_mask=mask[:1], pixel_values=expanded["pixel_values"], max_new_tokens=1)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def record(size, boxes, mask=None) -> Record:
    return Record("r:1", "d", "Who?", " red ", (png(tiny.photo(*size)),), (boxes,), (mask,))


def test_boxes_follow_the_padded_square(vlm):
    """90 x 60 in a square of 90: 15 pixels of padding above and below, 22.5 pixels a token."""
    size, box = (90, 60), (0.0, 0.0, 0.3, 0.3)
    moved = np.zeros((4, 4), bool)
    moved[0:2, 0:2] = True  # x 0..27, y 15..33 pixels
    (mask,) = evidence(record(size, (box,)), [size], vlm.processor)
    np.testing.assert_array_equal(mask, moved)
    (mask,) = evidence(record(size, ((0.5, 1.0, 1.0, 1.0),)), [size], vlm.processor)
    assert mask[3, 2:].all() and mask.sum() == 2, "y 75 pixels"
    released = np.zeros((4, 4), bool)
    released[0:2, 0:2] = True  # int(0.3 * 4) = 1
    (mask,) = evidence(record(size, (box,)), [size], vlm.processor, released=True)
    np.testing.assert_array_equal(mask, released)
    (mask,) = evidence(record(size, ((0.5, 0.9, 1.0, 1.0),)), [size], vlm.processor, released=True)
    assert mask[3, 2:].all(), "the picture's lower edge is the square's"
    tall = (60, 90)
    (mask,) = evidence(record(tall, ((0.0, 0.0, 0.1, 0.1),)), [tall], vlm.processor)
    assert mask[0, 0] and mask.sum() == 1, "x 15..21 pixels"
    white = Image.new("L", size, 255)
    (mask,) = evidence(record(size, (), png(white)), [size], vlm.processor)
    assert mask.all(), "15 pixels of padding leave no token of 22.5 without the picture"
    thin = Image.new("L", (100, 20), 255)
    (mask,) = evidence(record((100, 20), (), png(thin)), [(100, 20)], vlm.processor)
    assert mask[1:3].all() and not mask[[0, 3]].any()


@pytest.mark.parametrize("size", [(90, 60), None], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_lengths_known_beforehand_are_those_of_the_sample(vlm, size, rows):
    from gp_jax.data.collate import lengths

    maker = SampleMaker(vlm.processor, rows, 4096)
    made_of = record(size, ((0, 0, 1, 1),)) if size else Record("r:2", "d", "Who?", "red", (), (), ())
    entry = Entry(made_of.id, "d", "Who?", made_of.answer, (size,) if size else ())
    said, made = maker.measure([entry], "Briefly.")[0], maker.make(made_of, "Briefly.")
    assert said.shape == lengths(made.prompt.slots.size, made.prompt.ids.size, made.answer.size, rows)
    assert said.visual == made.prompt.count == made.reference.size
    assert vlm.processor.tokenizer.decode(made.answer) == "red</s>", "without <s>: it goes on behind the prompt"


@pytest.mark.parametrize("size, cut, depth", [("7b", 21, 32), ("13b", 26, 40)])
@pytest.mark.parametrize("kind", ["gqa", "own_data"])
def test_shipped_configurations(size, cut, depth, kind):
    from pathlib import Path

    from gp_jax.commands import ask
    from gp_jax.training.command import parse
    from gp_jax.training.settings import GlimpseSettings

    configs, known = Path(__file__).parents[2] / "configs", SIZES[f"llava-1.5-{size}"]
    path = configs / f"llava_1_5_{size}_{kind}.py"
    if path.exists():  # own data: 7b only
        config = parse(["--config", str(path)]).train().check()
        glimpse = glimpse_config_of(config, known)
        assert glimpse.reduce_layer == cut and glimpse.selected_layers == (cut,) and glimpse.le_layers == tuple(range(depth))
        assert not glimpse.use_attention_logits and glimpse.selected_visual_layers == known.vision.usual_conditions
        assert glimpse == glimpse_config_of(dataclasses.replace(config, glimpse=GlimpseSettings()), known), "the defaults are the released"
        assert path.read_text().startswith(f'"""gp-jax train --config {path.stem}')
    raw = dataclasses.replace(config, glimpse=GlimpseSettings(use_attention_logits=True)) if path.exists() else None
    assert raw is None or glimpse_config_of(raw, known).use_attention_logits
    args = ask.parse(["photo.png", "Who?", "--config", str(configs / f"llava_1_5_{size}.py")])
    assert (args.model, args.glimpse) == (f"liuhaotian/llava-v1.5-{size}", f"ashun989/GlimpsePrune_LLaVA-1.5-{size.upper()}")


def glimpse_config_of(config, model):
    from gp_jax.training.build import glimpse_config

    return glimpse_config(config.glimpse, model)


BAD = {
    "mm_projector_type 'linear' is not supported": dict(mm_projector_type="linear"),
    "mm_vision_select_feature 'cls_patch' is not supported": dict(mm_vision_select_feature="cls_patch"),
    "mm_vision_select_layer=9 must be one of 5 hidden states": dict(mm_vision_select_layer=9),
    "image_aspect_ratio 'anyres' is not supported": dict(image_aspect_ratio="anyres"),
    "mm_vision_tower=5 must be a folder or a Hub id": dict(mm_vision_tower=5),
    "vision_config: model_type 'siglip_vision_model' is not supported": dict(vision_config={"model_type": "siglip_vision_model"}),
    "sliding_window=7 is not supported": dict(sliding_window=7),
    "rope_scaling: type 'linear' is not supported": dict(rope_scaling={"type": "linear", "factor": 2.0}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configs(folder, message):
    from gp_jax.pretrained.tower import with_tower

    with pytest.raises(GlimpseError) as error:
        model_config(with_tower(json.loads((folder / "config.json").read_text()) | BAD[message], folder))
    assert message in str(error.value)


def test_visual_layers_are_hidden_states(vlm):
    from tiny_models import GLIMPSE

    settings = GLIMPSE | tiny.GLIMPSE
    assert glimpse_config(settings | {"selected_visual_layers": [4, 0]}, vlm.config).selected_visual_layers == (4, 0)
    with pytest.raises(GlimpseError, match="selected_visual_layers=.* must be distinct .* in 0..4"):
        glimpse_config(settings | {"selected_visual_layers": [5]}, vlm.config)
