"""Settings of the server, which are the options of `gp-jax serve`."""

import os
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from gp_jax.errors import GlimpseError, printable

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
KEY_VARIABLE = "GP_JAX_API_KEY"


def size(text: str, name: str) -> int:
    """Bytes, from a number with K, M, G or T behind it. Raises: GlimpseError that names the option."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not found:
        raise GlimpseError(f"--{name} {printable(text, 40)}: is not a size such as 512M or 2G")
    return int(float(found[1]) * UNITS[found[2].upper()])


@dataclass(frozen=True)
class ServerSettings:
    """Serve a model to many users at once, with OpenAI's interface.

    gp-jax serve scenes
    gp-jax serve MODEL --glimpse GLIMPSE --kv-memory 8G --max-prompt 8192
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder or Hugging Face Hub id of the base model; "scenes" is the bundled one."""
    glimpse: str | None = None
    """Folder or Hub id of the glimpse; by default the model folder's own, if it has one."""
    adapter: str | None = None
    """Folder or Hub id of a LoRA adapter in PEFT's files."""
    dtype: str | None = None
    """Weights and activations: float32 or bfloat16. [default: as stored]"""
    mesh: str = ""
    """Devices of this machine that share the model, such as data=1,fsdp=1,tensor=4; -1: all that remain. [default: one device]"""
    name: str | None = None
    """Name of the model in requests. [default: as MODEL]"""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Key that requests must send; better in the environment, as GP_JAX_API_KEY. [default: none is needed]"""
    kv_memory: str = "1G"
    """Memory for the caches of all rows, e.g. 512M or 8G."""
    vision_cache: str = "256M"
    """Memory for pictures as the vision tower sees them; 0 turns the cache off."""
    max_prompt: int = 2048
    """Longest prompt, in tokens with the visual ones."""
    max_visual_tokens: int | None = None
    """Scale larger pictures down to this number of visual tokens. [default: as the model's processor does]"""
    max_new_tokens: int = 256
    """Longest answer; the place of every row has room for it."""
    max_rows: int = 16
    """Most answers of one pool that are generated at once."""
    capacities: tuple[int, ...] = ()
    """Rows of cache that a prompt may have, per pool, ascending. [default: as --rungs says, up to --max-prompt]"""
    rungs: Literal["few", "many"] | None = None
    """Lengths and sizes that programs are compiled for: few, for a fast start, or many, which pad less. [default: few for small models]"""
    methods: tuple[str, ...] = ()
    """Further pruning methods that requests may name, each with fixed_remain_ratio, e.g. fastv visionzip."""
    gap: float = 0.2
    """Seconds after which running answers get their next token although a prompt is being read (plus one block of a layer)."""
    visit: float = 0.02
    """Seconds of decoding that the host may leave the device alone for: fast steps are taken several at a time."""
    queue: int = 64
    """Most requests that wait; one more is answered 429."""
    timeout: float = 300.0
    """Seconds after which a request is given up, waiting and sending included."""
    drain: float = 30.0
    """Seconds that running answers have after SIGTERM."""
    max_body: str = "32M"
    """Largest request body."""
    max_pictures: int = 16
    """Most pictures of a request."""
    max_pixels: int = 40_000_000
    """Most pixels of a picture, checked before it is decoded."""
    max_messages: int = 128
    """Most messages of a request."""
    fetch_hosts: tuple[str, ...] = ()
    """Hosts from which pictures are fetched by https. [default: none; pictures come as data: URLs]"""
    fetch_seconds: float = 10.0
    """Longest time to fetch a picture."""
    fetch_bytes: str = "16M"
    """Largest picture that is fetched."""

    def __post_init__(self) -> None:
        if not self.model:
            raise GlimpseError("MODEL is missing: a folder, a Hugging Face Hub id, or scenes, the bundled model")
        for name in ("kv_memory", "vision_cache", "max_body", "fetch_bytes"):
            size(getattr(self, name), name.replace("_", "-"))
        least = dict(max_prompt=32, max_new_tokens=1, max_rows=1, max_pictures=0, max_pixels=1, max_messages=1, queue=1, port=0)
        for name, low in least.items():
            if not low <= getattr(self, name) < 2**31:
                raise GlimpseError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {low}")
        for name in ("gap", "visit", "timeout", "drain", "fetch_seconds"):
            if not 0 < getattr(self, name) < 1e6:
                raise GlimpseError(f"--{name.replace('_', '-')} {getattr(self, name)} must be a positive number of seconds")
        if self.port > 65535:
            raise GlimpseError(f"--port {self.port} is not a port")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise GlimpseError(f"--dtype {self.dtype} is not float32, bfloat16 or float16")
        if self.max_visual_tokens is not None and not 1 <= self.max_visual_tokens <= self.max_prompt:
            raise GlimpseError(f"--max-visual-tokens {self.max_visual_tokens} must be in 1..{self.max_prompt} (--max-prompt)")
        if self.capacities and (list(self.capacities) != sorted(set(self.capacities)) or self.capacities[0] < 1):
            raise GlimpseError(f"--capacities {' '.join(map(str, self.capacities))} must ascend")

    def bytes_of(self, name: str) -> int:
        """One of the sizes in bytes."""
        return size(getattr(self, name), name.replace("_", "-"))

    @property
    def key(self) -> str | None:
        """The key that requests must send."""
        return self.api_key or os.environ.get(KEY_VARIABLE) or None

    @property
    def served_name(self) -> str:
        """Name of the model in requests."""
        return self.name or self.model
