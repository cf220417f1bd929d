"""A step of the stage `plus` compiled for TPUs that are not here: with fake devices in their place, and with the TPU compiler."""

import contextlib
import json

import jax
import numpy as np
import pytest

from gp_jax import GlimpseError
from gp_jax.ahead import compiling, plus, training
from gp_jax.ahead.plus import Questions, compile_plus
from gp_jax.commands import compile as command
from gp_jax.pretrained.hf_config import model_config
from gp_jax.tiny import CONFIG

ASKED = Questions(batch=4, visual_tokens=150, prompt_tokens=20, answer_tokens=8, retention=0.2, group=2, after=3)
MESH = dict(fsdp=4, tensor=2, dtype="float32")


@pytest.fixture(scope="module")
def fits():
    """On eight fake devices, for the backend that is here: without and with the KL pass."""
    with pytest.MonkeyPatch.context() as patch:
        fake(patch)
        return [compile_plus(model_config(CONFIG, {}), "v5e:2x4", ASKED, beta=beta, rank=4, **MESH) for beta in (0.0, 0.04)]


def fake(patch):
    patch.setattr(training, "topology_devices", lambda topology: jax.devices())
    for module in (compiling, training):
        patch.setattr(module, "targeting", lambda backend: contextlib.nullcontext())


def test_x(fits):
    for fit in fits:
        print(plus.report(fit))
        for p in fit.programs:
            print(p.name, p.stage, p.resident)
    assert 0
