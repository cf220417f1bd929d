"""What the site needs beside the pages: the bundled model's card, and links that lead out of docs/."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

CARD = "gp_jax/pretrained/bundled/scenes/README.md"


def on_files(files: Files, config: Any) -> Files:
    """Adds the model card, which lies beside the model."""
    root = Path(config["config_file_path"]).parent
    text = re.sub(r"\]\((?:\.\./)+docs/", "](", (root / CARD).read_text(encoding="utf-8"))
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    files.append(File.generated(config, "model_card.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the card."""
    return markdown.replace(f"](../{CARD}", "](model_card.md")
