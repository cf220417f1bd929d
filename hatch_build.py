"""The package's description on an index, which has neither the pictures nor the pages that README links to."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

NOTE = "\n\nThe pictures and pages that this text was written beside are in the source distribution.\n"


def without_neighbours(text: str) -> str:
    """Markdown without pictures and links that lead to files beside it; what links said stays."""
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text).rstrip() + NOTE


class Description(MetadataHookInterface):
    """Sets the field `readme`."""

    def update(self, metadata: dict) -> None:
        """Called while a wheel or a source distribution is made."""
        text = without_neighbours((Path(self.root) / "README.md").read_text(encoding="utf-8"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
