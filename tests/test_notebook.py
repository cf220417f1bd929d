"""The notebook runs from top to bottom, as a user would run it."""

import os
import shutil
from pathlib import Path

import pytest
from xla_flags import flags

ROOT = Path(__file__).parents[1]


@pytest.mark.documentation
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    shutil.copy(ROOT / "docs/pictures/scene.png", tmp_path / "docs/pictures/scene.png")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", flags(devices=8))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(ROOT / "notebooks" / "glimpse.ipynb", as_version=4)
    assert all(not cell.outputs for cell in book.cells if cell.cell_type == "code"), "outputs are not committed"
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    html = "".join(output.data.get("text/html", "") for output in shown if "data" in output)
    text = "".join(output.get("text", "") for output in shown)
    assert "striped white" in html and "data:image/jpeg" in html
    assert any("image/png" in output.data for output in shown if "data" in output), "the map"
    assert "above 0.5:  11 of 256 kept, 'striped white'" in text and "all: 256 of 256 kept" in text and "pruned: decoder prefill" in text
    assert os.environ["JAX_PLATFORMS"] == "cpu"
