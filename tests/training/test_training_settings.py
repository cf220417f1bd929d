"""Training against the method written out in torch (`torch_trainer`), which is itself held against the released numbers."""

import numpy as np
import optax
import pytest
import tiny_models as tiny
import torch
from reference import released_model
from torch_trainer import Example, TorchTrainer

from gp_jax import GlimpseVLM
from gp_jax.data.collate import Shape, TrainSample, train_batch
from gp_jax.pretrained.params import checkpoint_name, flat_params
from gp_jax.processing.layout import read_samples
from gp_jax.training.settings import LossConfig
from gp_jax.training.step import Counts, TrainingStep

torch.set_num_threads(1)  # tiny operations: threads only wait for each other

ALL_KEYS = "log-softmax over the answer too, several taps"
SETTINGS = {
    "base": {},
    "deep supervision, windowed, three conditions": dict(deep_supervision=True, attn_fuse_global=False, selected_visual_layers=[0, 3, 2]),
    "V2, windowed, flash layout of values": dict(attn_fuse_type="AttnFuserV2", attn_fuse_global=False, attn_fuse_use_flash_attn=True),
    "le_length 3 at some layers, layernorm": dict(le_length=3, le_layers=[2, 0], le_norm_type="layernorm"),
    "log-softmax, several taps": dict(use_attention_logits=False, selected_layers=[2, 0], reduce_layer=2),
    ALL_KEYS: dict(use_attention_logits=False, selected_layers=[2, 0], reduce_layer=2),
    "no glimpse rows": dict(le_layers=[], selected_layers=[0, 1], use_attention_logits=False),
    "V2, deep supervision, cut behind the last layer": dict(
        attn_fuse_type="AttnFuserV2", deep_supervision=True, reduce_layer=1000, selected_layers=[1, 2]
    ),
}
# Prompts of different lengths, the last number of each is the answer: one image, two images, none.
CONVERSATIONS = [[4, (4, 6), 5, 6], [3, (3, 5), 2, (2, 7), 6, 3], [9, 4]]
SHAPE, ROWS = Shape(slots=64, prompt=64, tail=16), 3


def conversations(seed: int) -> list[Example]:
    """CONVERSATIONS with random contents and evidence."""
    random, examples = np.random.default_rng(seed), []
    for number, segments in enumerate(CONVERSATIONS):
        inputs = tiny.inputs([segments], seed=10 * seed + number)
        ids = torch.from_numpy(inputs["input_ids"][0])
        ids[-1] = tiny.EOS
        reference = torch.from_numpy(random.random(int((ids == tiny.IMAGE).sum())) < 0.3)
        pictures = [] if inputs["pixel_values"] is None else [inputs["pixel_values"], inputs["image_grid_thw"]]
        examples.append(Example(ids, len(ids) - segments[-1], *map(torch.from_numpy, pictures), *[reference] * bool(pictures)))
    return examples


def samples(vlm: GlimpseVLM, examples: list[Example]) -> list[TrainSample]:
    """The same for gp_jax."""
    made = []
    for example in examples:
        ids, pictures = example.input_ids.numpy(), (example.pixel_values, example.image_grid_thw)
        pictures = [None if x is None else x.numpy() for x in pictures]
        prompt = read_samples(vlm.config, ids[None, : example.start], None, *pictures)[0]
        reference = np.zeros(0, bool) if example.reference is None else example.reference.numpy()
        made.append(TrainSample(prompt, ids[example.start :], reference))
    return made


def whole_step(members: list[TrainSample]) -> Counts:
    return Counts(np.float32(sum(m.answer.size for m in members)), np.float32(sum(m.prompt.count > 0 for m in members)))


def jax_step(vlm: GlimpseVLM, step: TrainingStep, *micro_batches: list[TrainSample]) -> tuple[dict, dict]:
    """Metric sums and gradients by released name of a step in these micro-batches."""
    state, gathered = step.start()
    counts, first = whole_step([m for members in micro_batches for m in members]), 0
    for members in micro_batches:
        batch = train_batch(members, vlm.config, ROWS, SHAPE, vlm.glimpse_config.rows, range(first, first + ROWS))
        gathered, first = step.accumulate(gathered, state, batch, counts), first + len(members)
    grads = {checkpoint_name(path): np.array(value) for path, value in flat_params(gathered.grads).items()}
    return {name: float(value) for name, value in gathered.sums.items()}, grads


def torch_step(trainer: TorchTrainer, examples: list[Example]) -> tuple[dict, dict]:
    theirs = trainer.gradients(examples)
    sums = dict(language=theirs.lm_loss, dice=theirs.dice, bce=theirs.bce, loss=theirs.loss)
    return {k: v.item() for k, v in sums.items()}, {name: p.grad.numpy() for name, p in trainer.parameters.items()}


def assert_equal_steps(ours: tuple[dict, dict], theirs: tuple[dict, dict]) -> None:
    for name, value in theirs[0].items():
        np.testing.assert_allclose(ours[0][name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert not [name for name, grad in ours[1].items() if name not in theirs[1] and grad.any()]
    for name, grad in theirs[1].items():
        error, size = np.linalg.norm(ours[1][name] - grad), np.linalg.norm(grad)
        np.testing.assert_allclose(error, 0, atol=1e-4 * size, err_msg=f"gradient of {name}, whose norm is {size:.1e}")


def make(folder, setting: str):
    """The same model here and in torch."""
    glimpse, number = tiny.GLIMPSE | SETTINGS[setting], list(SETTINGS).index(setting)
    model = tiny.hf_model(seed=number, kv_heads=4 if number % 2 else 2, tied=number % 3 == 1)
    weights = tiny.glimpse_weights(glimpse, seed=number)
    model.save_pretrained(folder / "base")
    tiny.save_glimpse(folder / "glimpse", model, glimpse, weights)
    return GlimpseVLM.from_pretrained(folder / "base", glimpse=folder / "glimpse"), model, glimpse, weights


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_torch(setting, tmp_path):
    vlm, *torch_model = make(tmp_path, setting)
    examples, all_keys = conversations(seed=1), setting == ALL_KEYS
    members = samples(vlm, examples)
    step = TrainingStep(vlm.model, optax.sgd(1.0), lambda _: 1.0, LossConfig(answer_in_denominator=all_keys))
    whole = jax_step(vlm, step, members)
    theirs = torch_step(TorchTrainer(*torch_model, answer_in_denominator=all_keys), examples)
    assert_equal_steps(whole, theirs)
    assert all(grad.any() for grad in theirs[1].values())
    assert_equal_steps(jax_step(vlm, step, members[2:], members[:2]), whole)


@pytest.mark.parametrize("setting", ["deep supervision, windowed, three conditions"])
def test_remat_changes_nothing(setting, tmp_path):
    vlm, *_ = make(tmp_path, setting)
    members = samples(vlm, conversations(seed=1))
    steps = (TrainingStep(vlm.model, optax.sgd(1.0), lambda _: 1.0, LossConfig(), remat=remat) for remat in (True, False))
    assert_equal_steps(*(jax_step(vlm, step, members) for step in steps))


@pytest.mark.parametrize("case", ["single", "wide"])
def test_the_torch_trainer_reproduces_the_released_code(golden_folder, golden, case):
    def recorded(name):
        return torch.from_numpy(golden[f"{case}.{name}"])

    trainer = TorchTrainer(*released_model(golden_folder))
    start = int((recorded("train.labels")[0] != -100).int().argmax())
    pictures = (recorded("pixel_values"), recorded("image_grid_thw"), recorded("train.ref_mask").flatten())
    theirs = trainer.gradients([Example(recorded("train.input_ids")[0], start, *pictures)])
    for name in ("lm_loss", "dice", "bce", "loss"):
        np.testing.assert_allclose(getattr(theirs, name), golden[f"{case}.train.{name}"], rtol=1e-5)
    np.testing.assert_allclose(theirs.mask_logits[0], golden[f"{case}.train.mask_logits"], atol=1e-4, rtol=0)
    grads = {name.removeprefix(f"{case}.train.grad."): g for name, g in golden.items() if name.startswith(f"{case}.train.grad.")}
    assert grads.keys() == trainer.parameters.keys()
    for name, parameter in trainer.parameters.items():
        assert np.linalg.norm(parameter.grad.numpy() - grads[name]) <= 1e-4 * np.linalg.norm(grads[name]), name
