"""How a result looks in a notebook: its pictures, its text and its numbers."""

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

from PIL import Image

from gp_jax.errors import printable

WIDEST = 640  # pixels of a picture


def picture_tag(picture: Image.Image) -> str:
    """HTML of a picture, which needs no file."""
    shown = picture.convert("RGB")
    shown.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=90)
    code = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="kept parts bright, dropped ones dark" src="data:image/jpeg;base64,{code}">'


def card(text: str, facts: Mapping[str, str], picture: Image.Image | None) -> str:
    """HTML of an answer."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    shown = picture_tag(picture) if picture is not None else ""
    return f"<div><p><b>{escape(printable(text))}</b></p>{shown}<table>{rows}</table></div>"


def describe(vlm: Any) -> str:
    """The repr of a `GlimpseVLM`: one line."""
    text, glimpse, folder = vlm.config.text, vlm.glimpse_config, vlm.name or vlm.folder
    cut = f"glimpse after layer {glimpse.reduce_layer} of {text.num_hidden_layers}" if glimpse else f"{text.num_hidden_layers} layers"
    return f"GlimpseVLM({str(folder)!r}, {vlm.config.family.title}, {cut}, {vlm.model.decoder.embed_tokens.dtype})"
