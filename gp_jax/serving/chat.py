"""A request for a chat completion: checked JSON, and what it asks for."""

import dataclasses
import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from pydantic import Field

from gp_jax.config.model import GlimpseConfig
from gp_jax.config.schema import AtLeastOne, Flag, one
from gp_jax.errors import GlimpseError, shown, some
from gp_jax.inference.requests import Temperature, TopP
from gp_jax.pruning.look import Look
from gp_jax.pruning.rule import Prune
from gp_jax.serving.errors import ApiError
from gp_jax.serving.jobs import BEST
from gp_jax.serving.settings import ServerSettings

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
RULE = tuple(field.name for field in dataclasses.fields(Prune))
LOOK = tuple(field.name for field in dataclasses.fields(Look) if field.name != "windows")
MAX_STOPS, MAX_STOP = 16, 256  # stop strings, and characters of one
TopK = Annotated[int, Field(ge=-1, lt=2**31)]  # 0 and -1: off
Top = Annotated[int, Field(ge=0, le=BEST)]
AnySeed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
# What would change the answer and is not done here: it is refused unless it has a value that asks for nothing.
NOTHING: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "echo": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
}


@dataclass(frozen=True)
class Chat:
    """What is asked for. messages: for the chat template; pictures: their URLs, in order."""

    messages: list[dict[str, Any]]
    pictures: list[str]
    prune: Prune | None
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stops: tuple[str, ...]
    logprobs: bool
    top_logprobs: int  # alternatives of every token
    stream: bool
    usage: bool  # a last chunk with the counts
    mask: bool  # which visual tokens stay, and their importance


def wrong(message: str, param: str | None = None, code: str | None = None) -> NoReturn:
    """Raises an error of the request."""
    raise ApiError(400, message, param, code)


def read_json(body: bytes) -> dict[str, Any]:
    """The body as an object. Raises: ApiError."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        found = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError):
        wrong("the body is not valid JSON")
    if not isinstance(found, dict):
        wrong("the body must be a JSON object")
    return found


def read_chat(found: dict[str, Any], settings: ServerSettings, glimpse: GlimpseConfig | None) -> Chat:
    """Checks a request. Raises: ApiError that names the field."""
    model = found.get("model", settings.served_name)
    if model != settings.served_name:
        raise ApiError(404, f"the model {shown(model)} does not exist; this server has {settings.served_name}", "model", "model_not_found")
    for name, values in NOTHING.items():
        if found.get(name) is not None and found[name] not in values:
            wrong(f"{name} is not supported", name, "unsupported_parameter")
    messages, pictures = read_messages(found.get("messages"), settings)
    options = {} if found.get("stream_options") is None else found["stream_options"]
    if not isinstance(options, dict):
        wrong("stream_options must be an object", "stream_options")
    most = settings.max_new_tokens
    asked = {name: found[name] for name in ("max_completion_tokens", "max_tokens") if found.get(name) is not None}
    name, new_tokens = next(iter(asked.items()), ("max_tokens", most))
    new_tokens = field(AtLeastOne, new_tokens, name)
    if new_tokens > most:
        wrong(f"{name}={new_tokens} is more than this server's {most} (--max-new-tokens)", name)
    seed = found.get("seed")
    logprobs, top = optional(found, Flag, "logprobs", False), optional(found, Top, "top_logprobs", 0)
    if top and not logprobs:
        wrong("top_logprobs needs logprobs", "top_logprobs")
    return Chat(
        messages=messages,
        pictures=pictures,
        prune=read_rule(found, glimpse),
        max_new_tokens=new_tokens,
        temperature=optional(found, Temperature, "temperature", 0.0),
        top_p=optional(found, TopP, "top_p", 1.0),
        top_k=max(0, optional(found, TopK, "top_k", 0)),
        seed=secrets.randbelow(2**31) if seed is None else field(AnySeed, seed, "seed") % (2**31 - 1),
        stops=read_stops(found.get("stop")),
        logprobs=logprobs,
        top_logprobs=top,
        stream=optional(found, Flag, "stream", False),
        usage=optional(options, Flag, "include_usage", False),
        mask=optional(found, Flag, "return_mask", False),
    )


def field(kind: Any, value: Any, name: str) -> Any:
    """A value of this type. Raises: ApiError that names the field."""
    try:
        return one(kind, value, name)
    except GlimpseError as error:
        raise ApiError(400, str(error), name) from None


def optional(found: dict[str, Any], kind: Any, name: str, default: Any) -> Any:
    """A field of this type; the default where it is missing or null. Raises: ApiError that names it."""
    return default if found.get(name) is None else field(kind, found[name], name)


def read_stops(found: Any) -> tuple[str, ...]:
    """Stop strings: none, one, or a list."""
    stops = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP for s in stops):
        wrong(f"stop must be a text or a list of at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters", "stop")
    return tuple(stops)


def read_messages(found: Any, settings: ServerSettings) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages for the chat template, and the URLs of their pictures. Raises: ApiError that names the part."""
    if not isinstance(found, list) or not found:
        wrong("messages must be a list of at least one message", "messages")
    if len(found) > settings.max_messages:
        wrong(f"{len(found)} messages are more than {settings.max_messages} (--max-messages)", "messages")
    messages: list[dict[str, Any]] = []
    pictures: list[str] = []
    for i, message in enumerate(found):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            wrong(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
        content = message.get("content")
        if isinstance(content, str):
            if role == "user" and not content.strip():
                wrong(f"{where}.content is empty", f"{where}.content")
            messages.append({"role": ROLES[role], "content": content})
            continue
        if not isinstance(content, list) or not content:
            wrong(f"{where}.content must be a text or a list of parts", f"{where}.content")
        parts = []
        for k, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind == "image_url" and role == "user":
                parts.append({"type": "image"})
                pictures.append(picture_url(part.get("image_url"), f"{where}.content[{k}].image_url"))
            else:
                wrong(f"{where}.content[{k}] must be a text, or a picture (image_url) of the user", f"{where}.content[{k}]")
        messages.append({"role": ROLES[role], "content": parts})
    if len(pictures) > settings.max_pictures:
        wrong(f"{len(pictures)} pictures are more than {settings.max_pictures} (--max-pictures)", "messages")
    if messages[-1]["role"] != "user":
        wrong("the last message must be the user's", "messages")
    return messages, pictures


def picture_url(found: Any, where: str) -> str:
    """The URL of an image_url part."""
    url = found.get("url") if isinstance(found, dict) else found
    if not isinstance(url, str) or not url:
        wrong(f"{where}.url must be a data: URL", where)
    return url


def read_rule(found: dict[str, Any], glimpse: GlimpseConfig | None) -> Prune | None:
    """How to prune: `prune`, an object with fields of `Prune`, null or false for none, true or "auto" for the model's own settings; its
    fields may also stand in the request itself, as far as the names are not OpenAI's. Raises: ApiError that names the field."""
    given = found.get("prune", True)
    fields = {name: found[name] for name in RULE if name in found and name != "seed"}
    if given is None or given is False:
        if fields:
            wrong(f"prune is off, but {some(fields)} is set", "prune")
        return None
    if isinstance(given, dict):
        if unknown := [name for name in given if name not in RULE]:
            wrong(f"prune has no field {some(map(shown, unknown))}; it has {some(RULE, len(RULE))}", "prune")
        fields = {**given, **fields}
    elif given is not True and given != "auto":
        wrong('prune must be an object with fields of Prune, "auto", or null for no pruning', "prune")
    if not fields:
        return Prune.from_config(glimpse) if glimpse else None
    if glimpse is None and fields.get("method", "glimpse") == "glimpse":
        wrong("this server's model has no glimpse to prune with", "prune")
    rule = Prune.from_config(glimpse) if glimpse else Prune(fixed_remain_ratio=1.0)
    if "fixed_remain_ratio" not in fields:
        fields["fixed_remain_ratio"] = None  # it would silence the others
    if "look" in fields:
        fields["look"] = read_look(fields["look"])
    try:
        return dataclasses.replace(rule, **fields)
    except GlimpseError as error:
        raise ApiError(400, f"prune: {error}", "prune") from None


def read_look(given: Any) -> Look | None:
    """Whether to look twice: an object with fields of `Look`, true for its defaults, null or false for one look. Raises: ApiError."""
    if given is None or given is False:
        return None
    found = {} if given is True else given
    if not isinstance(found, dict):
        wrong("prune.look must be an object with fields of Look, true, or null for one look", "prune.look")
    if unknown := [name for name in found if name not in LOOK]:
        wrong(f"prune.look has no field {some(map(shown, unknown))}; it has {some(LOOK, len(LOOK))}", "prune.look")
    try:
        return Look(**found)
    except GlimpseError as error:
        raise ApiError(400, f"prune.look: {error}", "prune.look") from None
