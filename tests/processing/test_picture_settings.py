"""Picture settings of a folder: what transformers makes of the same files, and one line for what nobody can use."""

import json
import warnings

import numpy as np
import pytest
import tiny_llava
from PIL import Image
from transformers import AutoImageProcessor

from gp_jax import GlimpseError
from gp_jax.config.model import ModelConfig
from gp_jax.config.vision import ClipConfig
from gp_jax.pretrained.hf_config import model_config
from gp_jax.processing import library
from gp_jax.processing.llava import LlavaProcessor, OriginalLlavaProcessor
from gp_jax.processing.picture_settings import OWN, SHARED
from gp_jax.processing.qwen import Processor
from gp_jax.tiny import CONFIG, PROCESSOR

pytestmark = pytest.mark.quick

SIDE = tiny_llava.SIDE
QWEN = model_config(CONFIG)
PATCHES = {name: PROCESSOR[name] for name in ("patch_size", "temporal_patch_size", "merge_size")}
CLIP = ModelConfig(
    "llava", ClipConfig(4, 24, 40, 2, 32, select_layer=3, image_size=SIDE, patch_size=14), QWEN.text, image_token_id=tiny_llava.IMAGE
)
PHOTO = tiny_llava.photo(300, 200)


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def areas(least, most):
    return {"shortest_edge": least, "longest_edge": most}


FILES = {
    "min and max": {"preprocessor_config": PATCHES | {"min_pixels": 784, "max_pixels": 20000}},
    "max alone": {"preprocessor_config": PATCHES | {"max_pixels": 20000}},
    "size": {"preprocessor_config": PATCHES | {"size": areas(784, 20000)}},
    "size and max, which wins": {"preprocessor_config": PATCHES | {"size": areas(784, 90000), "max_pixels": 20000}},
    "size as transformers 4.45 wrote it": {
        "preprocessor_config": PATCHES | {"size": {"min_pixels": 784, "max_pixels": 9}, "min_pixels": 784, "max_pixels": 20000}
    },
    "null": {"preprocessor_config": PATCHES | {"size": None, "max_pixels": 20000, "do_resize": None, "do_rescale": None}},
    "neither rescaled nor normalised": {"preprocessor_config": PATCHES | {"max_pixels": 20000, "do_rescale": False, "do_normalize": False}},
    "other numbers": {
        "preprocessor_config": PATCHES
        | {"max_pixels": 20000, "image_mean": [0.1, 0.2, 0.3], "image_std": 0.5, "resample": 2, "rescale_factor": 0.1}
    },
    "nested": {"processor_config": {"image_processor": PATCHES | {"max_pixels": 20000}}},
    "nested first": {
        "processor_config": {"image_processor": PATCHES | {"max_pixels": 20000}},
        "preprocessor_config": PATCHES | {"max_pixels": 80000},
    },
    "nested without": {
        "processor_config": {"processor_class": "Qwen2_5_VLProcessor"},
        "preprocessor_config": PATCHES | {"max_pixels": 20000},
    },
    "nested null": {"processor_config": {"image_processor": None}, "preprocessor_config": PATCHES | {"max_pixels": 20000}},
    "switched off": {"preprocessor_config": PATCHES | {"do_resize": False}},
}


@pytest.mark.filterwarnings("ignore:.*names no max_pixels")
@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_qwen_equals_transformers(tmp_path, files):
    write(tmp_path, config={"model_type": "qwen2_5_vl"}, **files)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    processor = Processor.load(tmp_path, QWEN)
    photo = PHOTO.resize((280, 196))  # sides that need no resizing
    expected, (pixels, grid) = theirs(images=photo, return_tensors="np"), processor.pixels([photo])
    np.testing.assert_array_equal(grid, expected["image_grid_thw"])
    np.testing.assert_array_equal(pixels, expected["pixel_values"])
    assert processor.plot(*photo.size).grids == (tuple(grid[0, 1:] // 2),)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": SIDE, "crop_size": SIDE},
        {"size": [SIDE, SIDE]},
        {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
        {"size": {"shortest_edge": 80}},
        {"do_resize": False},
        {"do_pad": True},
        {"do_pad": True, "do_center_crop": False},
        {"do_rescale": False, "do_normalize": False, "do_convert_rgb": False},
    ],
)
def test_llava_equals_transformers(tmp_path, settings):
    usual = {"image_processor_type": "LlavaImageProcessor", **tiny_llava.clip_settings(), **settings}
    write(tmp_path, config={"model_type": "llava"}, preprocessor_config=usual)
    expected = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(images=[PHOTO], return_tensors="np")["pixel_values"]
    processor = LlavaProcessor.load(tmp_path, CLIP)
    np.testing.assert_array_equal(processor.arrays([PHOTO])["pixel_values"], expected)
    assert processor.plot(*PHOTO.size).grids == ((4, 4),) and len(processor.areas(*PHOTO.size)) == 1


@pytest.mark.parametrize("kind", [Processor, LlavaProcessor, OriginalLlavaProcessor])
@pytest.mark.parametrize("files", [{}, {"processor_config": {"processor_class": "Qwen2_5_VLProcessor"}}])
def test_without_settings_nothing_is_taken_for_them(tmp_path, kind, files):
    write(tmp_path, **files)
    with pytest.raises(OSError):
        AutoImageProcessor.from_pretrained(tmp_path)
    processor = kind.load(tmp_path, QWEN if kind is Processor else CLIP)  # text and ready-made inputs need none
    for call in (lambda: processor.plot(60, 60), lambda: processor.arrays([PHOTO]), lambda: processor([[PHOTO]], ["Who?"])):
        with pytest.raises(GlimpseError, match="preprocessor_config.json: file is missing|no tokenizer files"):
            call()


def test_defaults_that_decide_are_said_aloud(tmp_path):
    write(tmp_path, preprocessor_config=PATCHES)
    with pytest.warns(UserWarning, match="preprocessor_config.json: names no max_pixels: transformers' default of 1003520"):
        Processor.load(tmp_path, QWEN)
    write(tmp_path, preprocessor_config=PROCESSOR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Processor.load(tmp_path, QWEN)


def test_the_tower_of_released_llava_is_known(tmp_path):
    write(tmp_path, config={"mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad"})
    with pytest.warns(UserWarning, match="as published for openai/clip-vit-large-patch14-336"):
        processor = OriginalLlavaProcessor.load(tmp_path, CLIP)
    assert processor.arrays([PHOTO])["pixel_values"].shape == (1, 3, SIDE, SIDE) and processor.image_processor.do_pad


NONSENSE = {
    "min_pixels=1000000000: must be at most": {"min_pixels": 10**9},
    "min_pixels=10000000 is more than": {"min_pixels": 10**7, "max_pixels": 2 * 10**7},
    "min_pixels=5000 is more than max_pixels=4000": {"min_pixels": 5000, "max_pixels": 4000},
    "max_pixels=0: must be at least": {"max_pixels": 0},
    "max_pixels=True: must be": {"max_pixels": True},
    "max_pixels=1e\\+300": {"max_pixels": 1e300},
    "max_pixels=\\[1\\]": {"max_pixels": [1]},
    "size must hold shortest_edge and longest_edge": {"size": {"longest_edge": 5000}, "min_pixels": None, "max_pixels": None},
    "size=7: must be": {"size": 7},
    "size='height': must be 'shortest_edge'": {"size": {"height": 5}},
    "do_resize=1: must be": {"do_resize": 1},
    "do_normalize='no': must be": {"do_normalize": "no"},
    "image_mean=\\[0.1, 0.2\\]": {"image_mean": [0.1, 0.2]},
    "image_mean\\[0\\]=nan": {"image_mean": [float("nan")] * 3},
    "image_std\\[0\\]=0": {"image_std": [0, 1, 1]},
    "image_std=0.0": {"image_std": 0.0},
    "rescale_factor=0: must be": {"rescale_factor": 0},
    "rescale_factor=nan": {"rescale_factor": float("nan")},
    "rescale_factor=inf": {"rescale_factor": float("inf")},
    "resample=9": {"resample": 9},
    "resample is null": {"resample": None},
    "resample='bicubic'": {"resample": "bicubic"},
    "does not fit the model: patch_size=1e\\+300": {"patch_size": 1e300},
    "does not fit the model: merge_size=\\[2\\]": {"merge_size": [2]},
}


@pytest.mark.parametrize(("message", "change"), NONSENSE.items(), ids=NONSENSE)
def test_nonsense_is_one_line_before_any_picture(tmp_path, monkeypatch, message, change):
    monkeypatch.setattr("gp_jax.processing.qwen.tried", lambda *args, **options: pytest.fail("a picture was tried"))
    for name, content in ((OWN, PROCESSOR | change), (SHARED, {"image_processor": PROCESSOR | change})):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(GlimpseError, match=f"{name}: {message}") as error:
            Processor.load(tmp_path, QWEN)
        assert len(str(error.value).splitlines()) == 1
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 10**6}, "size=1000000"),
        ({"size": {"shortest_edge": -1}}, "size="),
        ({"crop_size": {"height": 56}}, "settings cannot be used"),
        ({"crop_size": 10**5}, "crop_size="),
        ({"crop_size": 40}, "does not fit the model: pictures become 40 x 40"),
        ({"do_center_crop": "x"}, "do_center_crop="),
        ({"do_pad": 1}, "do_pad=1"),
        ({"image_mean": None}, "settings cannot be used"),
        ({"do_pad": True, "image_mean": 0.5}, "settings cannot be used"),
    ],
)
def test_nonsense_of_llava(tmp_path, settings, message):
    write(tmp_path, preprocessor_config=tiny_llava.clip_settings() | settings)
    with pytest.raises(GlimpseError, match=f"preprocessor_config.json: {message}"):
        LlavaProcessor.load(tmp_path, CLIP)


def test_files_that_are_none(tmp_path):
    write(tmp_path, processor_config={"image_processor": 5})
    with pytest.raises(GlimpseError, match="processor_config.json: image_processor=5 must be an object"):
        Processor.load(tmp_path, QWEN)
    write(tmp_path, processor_config=[])
    with pytest.raises(GlimpseError, match="processor_config.json: must hold a JSON object"):
        Processor.load(tmp_path, QWEN)


def test_what_the_schema_does_not_have_means_nothing(tmp_path):
    """transformers would put each of them in the place of a method."""
    write(tmp_path, preprocessor_config=PROCESSOR | {"preprocess": "x", "resize": 5, "auto_map": {"AutoImageProcessor": "code.X"}})
    assert Processor.load(tmp_path, QWEN).pixels([PHOTO])[1].shape == (1, 3)


def test_resizing_switched_off(tmp_path):
    write(tmp_path, preprocessor_config=PROCESSOR | {"do_resize": False})
    processor = Processor.load(tmp_path, QWEN)
    assert processor.plot(84, 56).grids == ((2, 3),) and not processor.shrinks
    assert processor.pixels([Image.new("RGB", (84, 56))])[1].tolist() == [[1, 4, 6]]
    with pytest.raises(GlimpseError, match="do_resize is false: sides of 300 x 200 pixels would have to be multiples of 28"):
        processor.plot(300, 200)
    with pytest.raises(GlimpseError, match="max_visual_tokens=9: do_resize is false"):
        processor.limited(9)


def test_pictures_that_llava_would_leave_too_large(tmp_path):
    write(tmp_path, preprocessor_config=tiny_llava.clip_settings(do_center_crop=False))
    processor = LlavaProcessor.load(tmp_path, CLIP)
    assert processor.plot(90, 90).grids == ((4, 4),)
    with pytest.raises(GlimpseError, match="do_center_crop is false: a picture of 90 x 60 pixels does not become 56 x 56"):
        processor.plot(90, 60)
    write(tmp_path, preprocessor_config=tiny_llava.clip_settings(do_center_crop=False, do_resize=False))
    processor = LlavaProcessor.load(tmp_path, CLIP)
    assert processor.plot(SIDE, SIDE).grids == ((4, 4),)
    with pytest.raises(GlimpseError, match="do_resize and do_center_crop are false"):
        processor.plot(90, 90)
    write(tmp_path, preprocessor_config=tiny_llava.clip_settings(do_pad=True))
    with pytest.raises(GlimpseError, match="padded to a square"):
        LlavaProcessor.load(tmp_path, CLIP).plot(100_000, 500)


def test_too_long_for_resizing(tmp_path):
    write(tmp_path, preprocessor_config=PROCESSOR)
    with pytest.raises(GlimpseError, match="a picture of 3000 x 10 pixels cannot be resized"):
        Processor.load(tmp_path, QWEN).plot(3000, 10)


def test_a_broken_package_is_not_the_folders_fault(tmp_path, monkeypatch):
    write(tmp_path, preprocessor_config=PROCESSOR)

    def fail(module):
        raise RuntimeError("Failed to import it") from RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(library.importlib, "import_module", fail)
    with pytest.raises(GlimpseError, match="the package torchvision cannot be used: .*nms does not exist") as error:
        Processor.load(tmp_path, QWEN)
    assert "preprocessor_config" not in str(error.value)
