"""Eight fake CPU devices, float32 products as they are, and the folders that tests read."""

import atexit
import gc
import os
import shutil
import signal
import tempfile

from xla_flags import flags

os.environ["XLA_FLAGS"] = flags(devices=8)
os.environ["JAX_PLATFORMS"] = "cpu"
# Both workers and all engines of equal shapes share what was compiled; the folder lives as long as the run.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gp_jax_compiled.")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what runs in the background; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.set_threshold(50_000, 20, 50)  # tracing makes many small objects, which would all be looked through again and again

from pathlib import Path

import hypothesis
import numpy as np
import pytest
from margins import Margins

from gp_jax.runtime import clock, progress

progress.BEATS = clock.BEATS = (
    3600.0,
    3600.0,
)  # tests count lines; on a busy machine work would add to them (tests/runtime/test_progress.py)

hypothesis.settings.register_profile("steady", deadline=None)  # a busy machine must not fail a test
hypothesis.settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--margins", action="store_true", help="print how much of its tolerance every float comparison has used")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--margins"):
        config.pluginmanager.register(Margins())


# Files that take longest, in seconds of the processor 20 to 180: begun first, they do not leave one worker alone at the end.
LONGEST = (
    "training/plus/test_plus_runs.py",
    "training/test_train_runs.py",
    "training/test_scenes_training.py",
    "training/test_training_step.py",
    "test_bundled.py",
    "test_documentation.py",
    "test_notebook.py",
    "commands/test_cli.py",
    "training/test_checkpoint.py",
    "pruning/test_pruning.py",
    "pruning/test_scorers.py",
    "ops/test_attention.py",
    "test_processes.py",
    "ahead/test_export.py",
    "inference/test_inference_fn.py",
    "evaluation/test_evaluation_runs.py",
    "ahead/test_ahead.py",
    "training/test_training_settings.py",
    "test_llava.py",
    "commands/test_llava_commands.py",
    "test_sharding.py",
    "training/test_train_stops.py",
    "test_parity.py",
    "glimpse/test_glimpse_settings.py",
    "runtime/test_compilation_cache.py",
    "evaluation/test_evaluation_plans.py",
    "test_fuzz.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="module", autouse=True)
def young_heap() -> None:
    """Programs that earlier files traced live until the end. A full collection, such as every checkpoint asks for, would walk through
    all of them: tests/training/test_train_stops.py took 125 s of the processor behind the others and takes 20 s alone."""
    gc.collect()
    gc.freeze()


ROOT = Path(__file__).resolve().parents[1]


def shared_folder() -> Path | None:
    """Goldens and photographs live beside the checkout; they are not part of the repository."""
    return next((p for p in (ROOT.parent / "shared", ROOT / "shared") if (p / "goldens").is_dir()), None)


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("../shared (goldens and photographs) is not here")
    return folder


@pytest.fixture(scope="session")
def golden_folder(shared: Path) -> Path:
    return shared / "goldens" / "qwen2_5_vl_gp"


@pytest.fixture(scope="session")
def golden(golden_folder: Path) -> dict[str, np.ndarray]:
    with np.load(golden_folder / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def golden_vlm(golden_folder: Path):
    from gp_jax import GlimpseVLM

    return GlimpseVLM.from_pretrained(golden_folder, glimpse=golden_folder)
