"""All targets."""

import tempfile
from pathlib import Path

from tests.fuzz import folders, records  # noqa: F401 - they fill the table
from tests.fuzz.good import QUESTION, picture
from tests.fuzz.registry import TARGETS, generator, processor


def prepare() -> None:
    """Imports and good inputs, so that no input is charged for them."""
    processor()([[picture()]], [QUESTION])
    for name in TARGETS:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                TARGETS[name].make(generator(name, 0, -1), Path(scratch))[0]()
            except BaseException:
                continue
