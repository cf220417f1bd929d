"""Training a whole model: turns that share a picture equal turns of their own; runs resume; a base gets its first glimpse."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scenes_tools
from etils import epath
from flax import nnx
from safetensors.numpy import load_file

from gp_jax import GlimpseError, GlimpseVLM, Prune, pipeline
from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.evaluation.plans import make_plan, make_plans
from gp_jax.scenes.feed import LoadScenes, blacken, canvas_of, hide
from gp_jax.scenes.palette import COLORS, SHAPES
from gp_jax.scenes.questions import SIDES
from gp_jax.scenes.settings import Canvas, ScenesConfig
from gp_jax.scenes.source import packed_scene
from gp_jax.scenes.turns import Hiding, TurnMaker, evidence, packed_batch
from gp_jax.training import forward
from gp_jax.training.base_losses import exact_turns
from gp_jax.training.base_settings import BaseConfig, BaseLossConfig
from gp_jax.training.build import attach_glimpse, glimpse_config
from gp_jax.training.loop import train
from gp_jax.training.scenes_base import build_base, export_base_run, identity
from gp_jax.training.settings import GlimpseSettings, OptimConfig, TrainConfig

SIDE, COUNT, ROWS = 16, 4, 96


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return scenes_tools.small_architecture(tmp_path_factory.mktemp("scenes") / "architecture")


@pytest.fixture(scope="module")
def vlm(architecture, tmp_path_factory):
    return scenes_tools.small_model(tmp_path_factory.mktemp("scenes") / "model", architecture)


def packed(vlm, hidings, scenes):
    unknown = [np.zeros((scene.image.shape[0] // SIDE, scene.image.shape[1] // SIDE), bool) for scene in scenes]
    return packed_batch(scenes, hidings, TurnMaker(vlm.processor), COUNT, ROWS, unknown)


def visible_hiding(scene, depth):
    tokens = (scene.image.shape[0] // SIDE) * (scene.image.shape[1] // SIDE)
    return Hiding(np.ones((len(scene.questions), tokens), bool), np.ones(tokens, bool), depth)


# Compiled once per shape of a batch, not operation by operation.
forward_packed = nnx.jit(forward.forward_packed)


def rows_of(batch, sample, turn):
    return np.flatnonzero(np.asarray(batch.turns.turn)[sample] == turn)


def test_packed_turns_equal_turns_of_their_own(vlm):
    """Every row of every turn, the answer's rows too."""
    scenes = [packed_scene(0, i, (128, 128), COUNT) for i in range(2)]
    batch = packed(vlm, [visible_hiding(scene, 3) for scene in scenes], scenes)
    logits, *_ = forward_packed(vlm.model, batch)
    maker, checked = TurnMaker(vlm.processor), 0
    for b, scene in enumerate(scenes):
        prepared = vlm.processor([[scene.image]] * COUNT, [q.question for q in scene.questions[:COUNT]])
        for t, question in enumerate(scene.questions[:COUNT]):
            rows = rows_of(batch, b, t)
            if not rows.size:
                continue
            asked, answer = maker.turn(question)
            prompt = prepared.inputs["input_ids"][t][prepared.inputs["attention_mask"][t] > 0]
            for k in range(len(answer)):
                ids = np.concatenate([prompt, answer[:k]]).astype(np.int64)[None]
                patches = len(prepared.inputs["pixel_values"]) // COUNT
                own = dict(pixel_values=prepared.inputs["pixel_values"][:patches], image_grid_thw=prepared.inputs["image_grid_thw"][:1])
                one = vlm.generate(input_ids=ids, **own, prune=None, max_new_tokens=1)
                np.testing.assert_allclose(logits[b, rows[len(asked) - 1 + k]], one.first_logits[0], atol=2e-5)
                assert batch.turns.targets[b, rows[len(asked) - 1 + k]] == answer[k]
                checked += 1
    assert checked > 12


@pytest.mark.parametrize("cut", [1, 2])
def test_hidden_tokens_equal_pruned_ones(vlm, cut):
    """Hiding in place gives what the engine gives that prunes: for the first answer token and, from a shortened cache, the next ones."""
    scene = packed_scene(0, 5, (128, 128), COUNT)
    masks = [evidence(question, 128, 128, (8, 8)) for question in scene.questions[:COUNT]]
    for t, (question, mask) in enumerate(zip(scene.questions[:COUNT], masks, strict=True)):
        one = dataclasses.replace(scene, questions=[question])
        batch = packed(vlm, [Hiding(mask[None], mask, cut)], [one])
        logits = np.asarray(forward_packed(vlm.model, batch)[0])[0]
        asked, answer = TurnMaker(vlm.processor).turn(question)
        inputs = vlm.processor([[scene.image]], [question.question]).inputs
        rule = Prune(reference_masks=[mask], after=cut - 1)
        done = vlm.generate(**inputs, prune=rule, max_new_tokens=2, eos_token_id=None)
        np.testing.assert_allclose(logits[len(asked) - 1], done.first_logits[0], atol=2e-5)
        assert done.keep[0].sum() == mask.sum() < mask.size
        if logits[len(asked) - 1].argmax() == answer[0]:
            assert logits[len(asked)].argmax() == done.tokens[0, 1]
        dense = vlm.generate(**inputs, prune=None, max_new_tokens=1)
        assert np.abs(dense.first_logits - done.first_logits).max() > 1e-3, f"turn {t}: pruning changed nothing, the test shows nothing"


def test_exact_turns_counts_whole_answers():
    scene = packed_scene(0, 3, (128, 128), COUNT)

    class Turns:
        family = np.array([[0, 1, -1]])
        turn = np.array([[0, 0, 0, 1, 1, -1]])
        targets = np.array([[-1, 4, 2, -1, 3, -1]])

    logits = np.zeros((1, 6, 5), np.float32)
    logits[0, 1, 4] = logits[0, 2, 2] = logits[0, 4, 1] = 1
    assert exact_turns(jax.numpy.asarray(logits), Turns).tolist() == [[True, False, False]]
    assert scene.questions


def test_hiding_never_hides_evidence():
    config = ScenesConfig(pruned=1.0)
    for index in range(20):
        scene = packed_scene(1, index, (192, 128), 6)
        hiding = hide(scene, np.random.default_rng(index), config, 8, SIDE)
        masks = [evidence(question, 192, 128, (8, 12)) for question in scene.questions]
        assert 1 <= hiding.cut < 8 and all(keep[mask].all() for keep, mask in zip(hiding.keep, masks, strict=True))
        assert all(hiding.seen[mask].all() for mask in masks)
    none = hide(scene, np.random.default_rng(0), dataclasses.replace(config, pruned=0.0), 8, SIDE)
    assert none.keep.all() and none.seen.all() and none.cut == 8


def test_anchored_relations_do_not_see_what_they_ask_for():
    config = ScenesConfig(anchored=1.0)
    hidden = 0
    for index in range(10):
        scene = packed_scene(1, index, (192, 192), 6, relations=0.5)
        hiding = hide(scene, np.random.default_rng(index), config, 8, SIDE)
        assert hiding.cut == 0 and hiding.seen.all()
        for question, keep in zip(scene.questions, hiding.keep, strict=True):
            if question.family == "relation":
                anchor, answer = (evidence(dataclasses.replace(question, boxes=(box,)), 192, 192, (12, 12)) for box in question.boxes)
                assert keep[anchor].all() and not keep[answer & ~anchor].any() and keep[~answer].all()
                hidden += 1
            else:
                assert keep.all()
    assert hidden >= 20, "half of the questions are relations"


def test_what_a_question_must_have_read(vlm):
    """Its last row, and what stands beside the shape that a relation names: the answer on the side that it asks for."""
    scenes = [packed_scene(1, index, (192, 192), COUNT, relations=0.5) for index in range(3)]
    batch = packed(vlm, [visible_hiding(scene, 8) for scene in scenes], scenes)
    found = 0
    for b, scene in enumerate(scenes):
        for t, question in enumerate(scene.questions):
            last = rows_of(batch, b, t)[~np.asarray(batch.turns.generated)[b, rows_of(batch, b, t)]][-1]
            assert batch.labels.row[b, t] == last
            beside = [f"{COLORS[c - 1]} {SHAPES[k - 1]}" if k > 0 else None for k, c in batch.labels.beside[b, t]]
            if question.family == "relation":
                side = next(i for i, word in enumerate(SIDES.values()) if f"directly {word} the" in question.question)
                assert beside[side] == question.answer
                found += 1
            else:
                assert (batch.labels.beside[b, t] == -1).all()
    assert found >= 3


def test_blackened_pictures_keep_their_evidence():
    scene = packed_scene(1, 2, (128, 128), 6)
    black, unknown = blacken(scene, SIDE)
    assert len(black.questions) == 2 and (black.image == 0).any()
    for x0, y0, x1, y1 in (box for question in black.questions for box in question.boxes):
        assert (black.image[int(y0) : int(y1), int(x0) : int(x1)] == scene.image[int(y0) : int(y1), int(x0) : int(x1)]).all()
    known = np.kron(~unknown, np.ones((SIDE, SIDE), bool))
    assert unknown.any() and (black.image[known] == scene.image[known]).all()


def base_config(architecture, out, **changes):
    canvases = (Canvas(96, 96, questions=3, early=1.0, late=1.0),)
    config = BaseConfig(
        model=str(architecture),
        out=str(out),
        scenes=ScenesConfig(canvases=canvases, threads=1, prefetch=1),
        optim=OptimConfig(name="muon", learning_rate=1e-3),
        batch_size=8,  # a picture per fake device
        accumulation=1,
        steps=4,
        log_every=1,
        validate_every=4,
        validation_scenes=8,
        save_every=2,
    )
    return dataclasses.replace(config, **changes)


def test_a_base_run_learns_resumes_and_exports(architecture, tmp_path, monkeypatch):
    from gp_jax.training import loop

    assert train(base_config(architecture, tmp_path / "whole", steps=4)) == {"step": 4, "signal": None}
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["group"] == "train"]
    assert losses[-1] < losses[0] and lines[-1]["group"] == "validation" and 0 <= lines[-1]["relation"] <= 1

    real = loop.Stop.now
    monkeypatch.setattr(loop.Stop, "now", lambda self: setattr(self, "signal", 15 if self.asked == 1 else None) or real(self))
    assert train(base_config(architecture, tmp_path / "parts"))["signal"] == 15
    monkeypatch.undo()
    assert train(base_config(architecture, tmp_path / "parts"))["step"] == 4
    tensors = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert tensors[0] == tensors[1], "a run in two parts ends in the same weights"
    with pytest.raises(GlimpseError, match=r"scenes\.pruned"):
        train(base_config(architecture, tmp_path / "parts", scenes=ScenesConfig(canvases=(Canvas(96, 96, 3, 1, 1),), pruned=0.1)))

    begun = build_base(base_config(architecture, tmp_path / "more", start=str(tmp_path / "whole")))
    embedding = load_file(tmp_path / "whole" / "export" / "model.safetensors")["model.language_model.embed_tokens.weight"]
    assert (np.asarray(begun.model(begun.step.params).decoder.embed_tokens[...]) == embedding).all(), "another run begins with its weights"
    with pytest.raises(GlimpseError, match="no checkpoint to start from"):
        build_base(base_config(architecture, tmp_path / "more", start=str(tmp_path / "nowhere")))

    more = base_config(architecture, tmp_path / "more", start=str(tmp_path / "whole"), blend=0.5, steps=1)
    run = build_base(more)
    state, _ = run.step.start()
    moved = dataclasses.replace(state, params=jax.tree.map(lambda value: value + 1.0, state.params))
    export_base_run(run, moved, epath.Path(tmp_path / "more"))
    half = load_file(tmp_path / "more" / "export" / "model.safetensors")["model.language_model.embed_tokens.weight"]
    np.testing.assert_allclose(half, embedding + 0.5, atol=1e-6)

    # The export is a base without a glimpse: it gets its first one.
    glimpse = TrainConfig(
        model=str(tmp_path / "whole" / "export"),
        out=str(tmp_path / "glimpse"),
        data=DataConfig(sources=(DataSource("scenes:16:64-121"),), shapes=1),
        glimpse=GlimpseSettings(reduce_layer=1, attn_fuse_size=16, visual_cond_size=16, attn_fuse_num_heads=2, start="prompt"),
        batch_size=8,
        accumulation=1,
        steps=1,
    )
    assert train(glimpse)["step"] == 1
    assert GlimpseVLM.from_pretrained(glimpse.model, glimpse=f"{glimpse.out}/export").glimpse_config.reduce_layer == 1


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_glimpse_may_begin_as_the_prompts_last_tokens(vlm, norm):
    model = nnx.clone(vlm.model)
    config = glimpse_config(GlimpseSettings(reduce_layer=1, le_length=2, le_norm_type=norm, attn_fuse_size=16), vlm.config)
    ids = vlm.processor.tokenizer(vlm.processor.chat(1, "?"))["input_ids"]
    vectors = np.asarray(attach_glimpse(model, config, 0, None, ids).glimpse.vectors())
    rows = np.asarray(vlm.model.decoder.embed(np.array(ids[-2:])))
    for vector, row in zip(vectors[0], rows, strict=True):
        assert vector @ row / np.linalg.norm(vector) / np.linalg.norm(row) > 0.99
    assert np.square(vectors).mean() == pytest.approx(np.square(rows).mean(), rel=0.2)


def test_base_settings_that_cannot_be(architecture, tmp_path):
    good = base_config(architecture, tmp_path)
    for changes, name in (
        (dict(steps=0), "steps"),
        (dict(model=""), "model"),
        (dict(blend=0.5), "needs `start`"),
        (dict(scenes=ScenesConfig()), "canvases"),
        (dict(scenes=ScenesConfig(canvases=(Canvas(100, 96, 3, 1, 1),))), "100x96"),
        (dict(scenes=dataclasses.replace(good.scenes, pruned=1.5)), "pruned"),
        (dict(scenes=dataclasses.replace(good.scenes, anchored=-1)), "anchored"),
    ):
        with pytest.raises(GlimpseError, match=name):
            dataclasses.replace(good, **changes).check()


def test_a_run_is_known_by_its_settings(architecture, tmp_path):
    scenes = dataclasses.replace(base_config(architecture, tmp_path).scenes, relations=0.5, anchored=0.1)
    chosen = identity(base_config(architecture, tmp_path, start="other", scenes=scenes), architecture)
    assert (chosen["start"], chosen["scenes"]["relations"], chosen["scenes"]["anchored"]) == ("other", 0.5, 0.1)
    unread = identity(base_config(architecture, tmp_path, loss=BaseLossConfig(reading_layer=-2)), architecture)
    assert unread == identity(base_config(architecture, tmp_path), architecture), "without a reading loss its layer is no setting"


def test_sizes_move_from_early_to_late(vlm):
    config = ScenesConfig(canvases=(Canvas(96, 96, 3, 1.0, 0.0), Canvas(128, 128, 3, 0.0, 1.0)), settled=0.5)
    assert canvas_of(0, 100, config).width == 96 and {canvas_of(n, 100, config).width for n in range(50, 100)} == {128}
    loader = LoadScenes(config, vlm.processor, (0, 1), 2, 100)
    one, other = loader.map(7), loader.map(7)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(one.batch), jax.tree.leaves(other.batch), strict=True))
    part = LoadScenes(config, vlm.processor, (1,), 2, 100).map(7)
    assert (part.batch.turns.ids[0] == one.batch.turns.ids[1]).all(), "another host draws the same scenes"


def test_plans_by_name(vlm):
    with pytest.raises(GlimpseError, match="did you mean 'oracle'"):
        make_plan("orcale", None)
    with pytest.raises(GlimpseError, match="needs a glimpse"):
        make_plan("glimpse", None)
    with pytest.raises(GlimpseError, match="keeps as many"):
        make_plans(["dense", "random"], None)
    with pytest.raises(GlimpseError, match="not a whole number"):
        make_plan("random-x", None)


def test_random_and_attention_keep_their_share(vlm):
    scenes = [packed_scene(2, i, canvas, 1) for i, canvas in enumerate([(128, 128), (192, 128), (128, 128)])]
    questions = [scene.questions[0].question for scene in scenes]
    pictures = [scene.image for scene in scenes]
    for rule in (Prune(method="random", fixed_remain_ratio=0.1), Prune(method="attention", fixed_remain_ratio=0.1, after=1)):
        together = vlm.answer(pictures, questions, prune=rule, max_new_tokens=2)
        assert [a.kept for a in together] == [6, 9, 6]
        alone = [vlm.answer(picture, question, prune=rule, max_new_tokens=2) for picture, question in zip(pictures, questions, strict=True)]
        assert all((a.keep[0] == b.keep[0]).all() for a, b in zip(together, alone, strict=True)), "a batch prunes as its samples do"
    other = vlm.answer(pictures, questions, prune=Prune(method="random", fixed_remain_ratio=0.1, seed=1), max_new_tokens=1)
    assert any((a.keep[0] != b.keep[0]).any() for a, b in zip(alone, other, strict=True))
    none = vlm.answer(pictures[0], questions[0], prune=Prune(method="nothing"), max_new_tokens=2)
    assert none.kept == 0
    for bad in (dict(method="atention"), dict(method="random"), dict(method="random", fixed_remain_ratio=0.1, seed=-1), dict(after=True)):
        with pytest.raises(GlimpseError, match=r"method|seed|after"):
            Prune(**bad)
    with pytest.raises(GlimpseError, match="after=7"):
        vlm.answer(pictures[0], questions[0], prune=Prune(method="nothing", after=7))


def test_attention_scorer_is_the_last_rows_attention(vlm):
    """Against a plain computation from the keys and queries of the layer."""
    scene = packed_scene(2, 0, (128, 128), 1)
    inputs = vlm.processor([[scene.image]], [scene.questions[0].question]).inputs
    done = vlm.generate(**inputs, prune=Prune(method="attention", fixed_remain_ratio=0.2, after=1), max_new_tokens=1)
    from gp_jax.processing.layout import prompt_input, read_samples, vision_input

    sample = read_samples(vlm.config, **inputs)[0]
    features = pipeline.see(vlm.model, vision_input([sample], vlm.config, 1, sample.slots.size))
    stream = pipeline.embed(vlm.model, prompt_input([sample], vlm.config, 1, sample.ids.size, 0), features)
    stream = pipeline.run(vlm.model, stream, 0, 1)
    layer, angles = vlm.model.decoder.layers[1], vlm.model.decoder.angles(stream.positions)
    q, k, _ = layer.self_attn.project(layer.input_layernorm(stream.hidden), angles)
    keys = np.repeat(np.asarray(k[0]), q.shape[1] // k.shape[1], axis=0)
    logits = np.einsum("nh,nth->nt", np.asarray(q[0, :, -1]), keys) * q.shape[-1] ** -0.5
    share = np.exp(logits - logits.max(1, keepdims=True))
    share = (share / share.sum(1, keepdims=True)).mean(0)[sample.image_token >= 0]
    best = np.argsort(-share)[: int(0.2 * sample.count)]
    assert sorted(np.flatnonzero(done.keep[0])) == sorted(best)
