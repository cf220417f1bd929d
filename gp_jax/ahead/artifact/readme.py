"""The README of an exported folder: how to load and call the program, its inputs and its outputs."""

from collections.abc import Mapping
from typing import Any

import jax

from gp_jax.ahead.artifact.names import EXAMPLE, EXPECTED, FACTS, PARAMS, PROCESSOR, PROGRAM, VENDOR
from gp_jax.inference.function import INPUTS, OUTPUTS
from gp_jax.inference.look_inputs import PREFIX

CALL = f"""import sys, jax, jax.export, numpy as np
from pathlib import Path
from orbax.checkpoint import v1 as ocp
here = Path.cwd()  # this folder
sys.path.append(str(here / "{VENDOR}"))  # flatbuffers, with which jax.export reads its files
program = jax.export.deserialize(bytearray((here / "{PROGRAM}").read_bytes()))
(shapes, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
params = ocp.load(here / "{PARAMS}", jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes))
outputs = jax.jit(program.call)(params, dict(np.load(here / "{EXAMPLE}")))
"""
CHECK = f"""print(outputs["tokens"])
print("as expected:", np.array_equal(outputs["tokens"], np.load(here / "{EXPECTED}")["tokens"]))
"""


def describe_input(name: str) -> str:
    """The line of INPUTS about an input; the inputs of all cuts share their lines, and a first look has those of whole pictures."""
    if name.startswith("cut"):
        return INPUTS[f"cut*_{name.split('_', 1)[1]}"]
    if name in INPUTS:
        return INPUTS[name]
    shape, meaning = INPUTS[name.removeprefix(PREFIX)].split(": ", 1)
    return f"{shape}, in sizes of its own: of the first look: {meaning}"


def table(rows: Mapping[str, str]) -> str:
    """A table of three columns from name -> "shape and dtype: meaning"."""
    cells = [(name, *text.split(": ", 1)) for name, text in rows.items()]
    return "\n".join(["| array | shape | what |", "|---|---|---|", *(f"| `{name}` | {shape} | {what} |" for name, shape, what in cells)])


def readme(facts: Mapping[str, Any], shapes: Mapping[str, jax.ShapeDtypeStruct], example: Mapping[str, Any]) -> str:
    """The text of the README. Args: facts: fields of export.json; shapes: of the inputs; example: facts about it, or empty."""
    rungs = facts["buckets"]
    sizes = dict(zip("BT", shapes["ids"].shape, strict=True)) | {"S": shapes["patches"].shape[1], "M": shapes["token_hw"].shape[1]}
    sizes |= {"A": shapes["positions"].shape[1], "N": min(sizes["M"], sizes["T"]), "n": facts["max_new_tokens"]}
    rule = ", ".join(f"{k}={v!r}" for k, v in (facts["prune"] or {}).items() if k != "reference_masks" and v not in (None, (), [], False))
    parts = [
        f"# {facts['model'] or 'A model'} as one exported JAX program",
        f"""From pixels and prompt to answer in one call, for {", ".join(facts["platforms"])}: vision tower, glimpse, pruning and greedy
decoding, with every bucket inside. Made with gp_jax {facts["gp_jax"]} and jax {facts["jax"]}; gp_jax is not needed to run it.

| | |
|---|---|
| pruning plan | {facts["plan"] or "dense"}{f" ({rule})" if rule else ""} |
| parameters | {facts["dtype"]} (`{PARAMS}/`, orbax: nested dicts of arrays; a glimpse is float32) |
| capacity | {sizes["B"]} sample(s) of {sizes["T"]} prompt rows and {sizes["M"]} vision slots, {sizes["n"]} new tokens |
| buckets inside | patches {rungs["patches"]}, prompt rows {rungs["prompt"]}, kept rows {rungs["kept"]} and everything |""",
        "## Load and call it\n\n`pip install jax orbax-checkpoint`, the jax of your machine. In this folder:",
        f"```python\n{CALL}```",
    ]
    if example:
        checked = "" if example["equal"] is None else "; when it was exported the program gave the same tokens as gp_jax's `generate`"
        checked = checked if example["equal"] is not False else "; in this dtype the program and `generate` round differently on it"
        parts += [
            f"The question of the example is {example['question']!r}. The answer was {example['text']!r}{checked}.",
            f"```python\n{CHECK}```",
        ]
    parts += [
        f"""`jax.jit(program.call)` is an ordinary jitted function: the first call compiles. `params` and inputs may be on a mesh instead
of one device (give `ocp.load` other shardings; the batch is the first axis of inputs). On several TPU chips the program must have been
exported with `--attention xla`: XLA cannot split the TPU's attention kernel.

The tokens as text: `transformers.AutoTokenizer.from_pretrained("{PROCESSOR}").decode(outputs["tokens"][0, :outputs["lengths"][0]])`.""",
        f"""## Your own inputs

On any machine with gp_jax (no accelerator, no weights: only `{PROCESSOR}/` and `{FACTS}` are read; `DIR` is this folder):

```python
import numpy as np
from gp_jax import artifact_inputs
np.savez("mine.npz", **artifact_inputs("DIR", "photo.jpg", "What does the sign say?"))
```

Lists of pictures and of questions make a batch. Pictures with too many visual tokens are scaled down (with `shrink=False` they are an
error); `prune=Prune(...)` changes the numbers of the keep rule. Without gp_jax
use `mine.npz` in place of `{EXAMPLE}`. With a loaded model
`GlimpseVLM.inference_inputs(inputs=..., buckets=..., prune=...)` does the same from a Hugging Face processor's arrays.""",
        "## Inputs\n\n" + f"Numpy or JAX arrays in a dict; here {', '.join(f'{k} = {v}' for k, v in sizes.items())}.",
        table({name: describe_input(name) for name in shapes}),
        "## Outputs",
        table(OUTPUTS),
        "The importance map of a picture of R x C visual tokens is `outputs['importance'][b, :R * C].reshape(R, C)`.",
    ]
    return "\n\n".join(parts) + "\n"
