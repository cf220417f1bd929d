"""LLaVA-1.5 and LLaVA-NeXT as one program, with the tokens of `generate`."""

import jax
import numpy as np
import pytest
import tiny_llava as tiny

from gp_jax import GlimpseError, GlimpseVLM, Ladder, Ladders, Prune, inference_buckets, inference_fn, inference_params
from gp_jax.commands import compile as compiling
from gp_jax.commands import export as exporting
from gp_jax.inference.function import picture_capacity
from gp_jax.pretrained.known import SIZES
from gp_jax.processing.windows import pack_windows

NEW = 4


@pytest.fixture(scope="module", params=[False, True], ids=["llava", "llava_next"])
def vlm(request, tmp_path_factory):
    folder = tiny.save_hf(tmp_path_factory.mktemp("model"), tiny.hf_model(request.param))
    return GlimpseVLM.from_pretrained(folder, glimpse=tiny.save_glimpse(folder / "glimpse"), ladders=tiny.LADDERS)


def test_gives_the_tokens_of_generate(vlm):
    """The tower in its smaller rung, its results padded to all slots; a row that only fills the batch."""
    prune, ladders = Prune(fixed_remain_ratio=0.3), {"patches": (16, 96), "prompt": (224,), "kept": (160,), "batch": (2,)}
    if vlm.config.vision.pinpoints:
        ladders["patches"] = (80, 96)
    buckets = Ladders(**{name: Ladder(name, rungs) for name, rungs in ladders.items()})
    infer = jax.jit(inference_fn(vlm.config, prune, buckets, NEW, glimpse=vlm.glimpse_config, eos_token_id=None))
    raw = vlm.processor([[tiny.photo(90, 60)]], ["Who?"]).inputs
    out = infer(inference_params(vlm.model), vlm.inference_inputs(inputs=raw, prune=prune, buckets=buckets))
    done = vlm.generate(**raw, prune=prune, max_new_tokens=NEW, eos_token_id=None)
    np.testing.assert_array_equal(out["tokens"][:1], done.tokens)
    np.testing.assert_array_equal(out["keep"][0, : done.keep[0].size], done.keep[0])
    np.testing.assert_allclose(out["first_logits"][:1], done.first_logits, atol=2e-5)


def test_buckets_hold_what_they_promise_and_no_tile_more(vlm):
    """The tiny models, whose pictures have up to 16 and 16 + 4 x 16 visual tokens; LLaVA-1.5 with its 576."""
    config, most = vlm.config, vlm.config.vision.most_tokens
    assert most == (80 if config.vision.pinpoints else 16)
    for capacity in (1, most):
        buckets = inference_buckets(config, visual_tokens=(capacity,))
        assert buckets.patches.rungs == (most,)
        for size in ((90, 60), (64, 64), (20, 200), (400, 10)):
            slots, _ = pack_windows(vlm.processor.plot(*size).seen, config.vision.window_side)
            assert slots.size <= most
    assert inference_buckets(config, visual_tokens=(most + 1,)).patches.rungs == (most + 16,)
    assert picture_capacity(inference_buckets(config, visual_tokens=(most,)), config, 128, 1) == most
    vlm.processor.limited(picture_capacity(inference_buckets(config, visual_tokens=(most,)), config, 128, 1))
    big = SIZES["llava-1.5-7b"]
    assert inference_buckets(big, visual_tokens=(576,)).patches.rungs == (576,)
    assert picture_capacity(inference_buckets(big, visual_tokens=(576,)), big, 128, 1) == 576


def test_export_takes_the_models_own_number_of_visual_tokens(vlm, tmp_path, monkeypatch):
    from gp_jax.ahead.artifact import write

    most, seen = vlm.config.vision.most_tokens, []
    monkeypatch.setattr(GlimpseVLM, "from_pretrained", lambda *args, **options: vlm)
    monkeypatch.setattr(write, "export", lambda vlm, program, *_: seen.append(program.buckets) or {"bytes": 0})
    argv = [str(vlm.folder), "--to", str(tmp_path / "out")]
    exporting.run(exporting.parse(argv))
    assert seen[0].patches.rungs == (most,)
    with pytest.raises(GlimpseError, match=f"--visual-tokens {most - 1}: this model's pictures have up to {most}"):
        exporting.run(exporting.parse([*argv, "--visual-tokens", str(most - 1)]))


def test_compile_asks_for_the_models_own_number_of_visual_tokens(monkeypatch):
    from gp_jax.ahead import generation
    from gp_jax.ahead import training as ahead_training

    asked = []

    def generating(config, glimpse, topology, request, **_):
        asked.append(request.visual_tokens)
        raise GlimpseError("far enough")

    def training(config, topology, *, visual_tokens, **_):
        asked.append(visual_tokens)
        raise GlimpseError("far enough")

    monkeypatch.setattr(generation, "compile_generation", generating)
    monkeypatch.setattr(ahead_training, "compile_training", training)
    for model in ("llava-1.5-7b", "7b"):
        for what, run in (("generate", compiling.generate), ("train", compiling.train)):
            args = compiling.parse(["--model", model, "--what", what])
            with pytest.raises(GlimpseError, match="far enough"):
                run(args, *compiling.model_named(model), {})
    assert asked == [576, 576, 4096, 2048]
