"""Two processes of four fake devices each answer a batch together, as one process on one device does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_tools import SMALL
from xla_flags import flags

from gp_jax import GlimpseVLM, Ladder, Ladders, Prune
from gp_jax.tiny import ID, make_checkpoint

# No rung of 4: a batch of 3 stays one. Neither divides over data x fsdp.
RUNGS = {"patches": (256,), "prompt": (128,), "kept": (48,), "decode": (8,), "batch": (2, 3)}
LADDERS = Ladders(**{name: Ladder(name, rungs) for name, rungs in RUNGS.items()})
MESH = (2, 2, 2)
BATCHES = {2: [(4, 6), (6, 3)], 3: [(5, 4), (3, 3), (2, 7)]}  # per sample rows and columns of its image, in merged tokens
NEW, PRUNE = 6, Prune(max_remain_ratio=0.3)

# Both processes write what they got; they share nothing but the coordinator.
CHILD = """
import sys, json
sys.path.insert(0, {tests!r})
import test_processes as t
from gp_jax.sharding import start_processes
start_processes({address!r}, 2, int(sys.argv[1]))
t.child({home!r}, int(sys.argv[1]))
"""


def inputs(count: int) -> dict[str, np.ndarray]:
    """A batch as a processor returns it, padded on the left."""
    rng, rows = np.random.default_rng(count), []
    for height, width in BATCHES[count]:
        image = [ID["<|vision_start|>"], *[ID["<|image_pad|>"]] * (height * width), ID["<|vision_end|>"]]
        rows.append([*rng.integers(0, 256, 5), *image, *rng.integers(0, 256, 3 + height)])
    length = max(map(len, rows))
    patches = sum(4 * height * width for height, width in BATCHES[count])
    return {
        "input_ids": np.array([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": rng.normal(size=(patches, 3 * 2 * 14 * 14)).astype(np.float32),
        "image_grid_thw": np.array([(1, 2 * height, 2 * width) for height, width in BATCHES[count]]),
    }


def answers(vlm: GlimpseVLM, end: list[int]) -> dict[str, np.ndarray]:
    """Everything that requests give, by name. end: tokens at which samples end."""
    found = {}
    for count in BATCHES:
        done = vlm.generate(**inputs(count), prune=PRUNE, max_new_tokens=NEW, eos_token_id=end)
        found |= {f"{count} {name}": getattr(done, name) for name in ("tokens", "first_logits", "positions", "attention_mask", "cached")}
        found |= {f"{count} keep {b}": keep for b, keep in enumerate(done.keep)}
    steps, batch = [], inputs(2)
    drawn = vlm.generate(**batch, prune=PRUNE, max_new_tokens=3, eos_token_id=None, temperature=1.0, seed=7, stream=steps.append)
    maps = vlm.glimpse(inputs=batch)
    return found | {"drawn": drawn.tokens, "streamed": np.stack(steps, axis=1), "map": maps[0][0]}


def child(home: str, process: int) -> None:
    """One of the two."""
    import jax

    from gp_jax import make_mesh

    assert jax.process_count() == 2 and jax.device_count() == 8
    end = json.loads((Path(home) / "end.json").read_text())
    vlm = GlimpseVLM.from_pretrained(Path(home) / "model", ladders=LADDERS, mesh=make_mesh(*MESH))
    np.savez(Path(home) / f"{process}.npz", **answers(vlm, end))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    make_checkpoint(folder / "model", hf_config=SMALL)
    return folder


def test_two_processes_answer_together(home):
    vlm = GlimpseVLM.from_pretrained(home / "model", ladders=LADDERS)
    # Tokens at which the samples end early and apart: no process can tell from its own when all have.
    free = vlm.generate(**inputs(2), prune=PRUNE, max_new_tokens=NEW, eos_token_id=None).tokens
    end = [int(free[0, 1]), int(free[1, 2])]
    (home / "end.json").write_text(json.dumps(end))
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        address = f"localhost:{unused.getsockname()[1]}"
    code = CHILD.format(tests=str(Path(__file__).parent), address=address, home=str(home))
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"XLA_FLAGS": flags(4)})
    processes = [subprocess.Popen([sys.executable, "-c", code, str(number)], **options) for number in range(2)]
    expected = answers(vlm, end)
    assert expected["2 tokens"].shape[1] < NEW
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    for process in range(2):
        found = dict(np.load(home / f"{process}.npz"))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            tolerance = 1e-4 if value.dtype == np.float32 else 0
            np.testing.assert_allclose(value, expected[name], atol=tolerance, rtol=0, err_msg=name)
