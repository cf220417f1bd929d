"""Every Python block of README and docs runs, on the bundled model and in a process that has no torch."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from xla_flags import flags

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Blocks that belong into files of another project, or talk to a server (tests/serving has one).
ELSEWHERE = ("from .base import BaseModel", "supported_VLM[", "from openai import OpenAI")
# What stands for what is not here: released models and photographs, and lengths whose programs take minutes to compile.
SUBSTITUTES = {
    r'"Qwen/[^"]*", glimpse="[^"]*", dtype="bfloat16"': '"scenes"',
    r'"Qwen/Qwen2.5-VL-7B-Instruct"': "SCENES",
    r'"docs/pictures/scene.png"|"(photo|a|b|c)\.jpg"': "SCENE",
    r"visual_tokens=\(256, 1024\)": "visual_tokens=(256,)",
    r"vlm\.warm_up\(batch=4\)": "vlm.warm_up(batch=1, patches=1024, prompt=512, max_new_tokens=1)",
    r'octaves\("kept", 128, 1024, parts=1\)': 'octaves("kept", 128, 256, parts=1)',
}
RUN = """
import json, sys
from importlib.machinery import PathFinder
class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ("torch", "torchvision") else super().find_spec(name, path, target)
sys.meta_path[:] = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
from gp_jax.pretrained.files import BUNDLED
names = {}
for name, block in json.load(open("blocks.json")):
    print(name, flush=True)
    page = name.partition(",")[0]
    known = names.setdefault(page, {"SCENES": str(BUNDLED["scenes"]), "SCENE": SCENE_PATH})
    exec(compile(block, name, "exec"), known)
assert "torch" not in sys.modules
"""


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, as a test runs them."""
    found = []
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if any(mark in block for mark in ELSEWHERE):
            continue
        for pattern, to in SUBSTITUTES.items():
            block = re.sub(pattern, to, block)
        found.append(block)
    return found


@pytest.mark.documentation
def test_every_python_block_runs(tmp_path):
    """Block after block: later ones of a page may use what earlier ones named. One process, so that pages share what is compiled."""
    scene = tmp_path / "scene.png"
    shutil.copy(ROOT / "docs/pictures/scene.png", scene)
    written = [(f"{page.name}, block {number}", block) for page in PAGES for number, block in enumerate(blocks(page), 1)]
    assert len(written) > 8
    (tmp_path / "blocks.json").write_text(json.dumps(written))
    (tmp_path / "run.py").write_text(RUN.replace("SCENE_PATH", repr(str(scene))))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags(devices=8), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-3000:]}"


@pytest.mark.quick
def test_configurations_that_are_named_are_there():
    for page in PAGES:
        for name in re.findall(r"--config (?:configs/)?(\w+)(?:\.py)?", page.read_text()):
            assert name in ("my_run",) or (ROOT / "configs" / f"{name}.py").exists(), (page, name)


@pytest.mark.quick
def test_the_package_index_shows_readme_without_what_it_does_not_have():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.without_neighbours((ROOT / "README.md").read_text())
    assert all(target.startswith(("https://", "#")) for target in re.findall(r"\]\(([^)]*)\)", text)) and "![" not in text
    assert (
        "[GlimpsePrune](https://arxiv.org" in text
        and "decoding row by row" in text
        and 'vlm.answer(["docs/pictures/scene.png"] * 2' in text
    )


@pytest.mark.quick
def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text()):
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), (page, target)
            if anchor and there.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                known = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor[1:] in known, (page, target, anchor)
