"""gp_jax as a model of lmms-eval (0.7), which provides tasks and scores.

    lmms-eval --model gp_jax --model_args pretrained=DIR_OR_ID,glimpse=DIR_OR_ID,max_remain_ratio=0.111 --tasks gqa,pope

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models`. This module imports neither lmms-eval nor torch until
lmms-eval asks for `GpJax`, a chat model: it takes conversations with pictures anywhere in them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gp_jax.errors import GlimpseError
from gp_jax.pruning.rule import Prune
from gp_jax.runtime.progress import Progress

if TYPE_CHECKING:
    from gp_jax.vlm import GlimpseVLM

MAX_NEW_TOKENS = 128  # for tasks that do not set it
RULE = ("reduce_threshold", "max_remain_ratio", "fixed_remain_ratio", "min_remain_num", "method", "after", "seed")
IGNORED = ("batch_size", "max_batch_size", "device")  # arguments that lmms-eval always passes; the first is used below


def manifest() -> Any:
    """The manifest with which lmms-eval registers the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("gp_jax", chat_class_path=f"{__name__}.GpJax")


def __getattr__(name: str) -> type:
    """Makes `GpJax` when it is first accessed."""
    if name != "GpJax":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    class GpJax(ChatModel, lmms):
        __doc__ = ChatModel.__doc__
        is_simple = False

    globals()[name] = GpJax
    return GpJax


def prune_rule(vlm: "GlimpseVLM", prune: bool, changes: Mapping[str, Any]) -> Prune | None:
    """The glimpse's own keep rule with the changes of the model arguments; None: nothing is pruned.

    Raises: GlimpseError when there is no glimpse and no other method.
    """
    if not prune:
        if changes:
            raise GlimpseError(f"prune=false and {next(iter(changes))} contradict each other")
        return None
    if vlm.glimpse_config is not None and changes.get("method", "glimpse") == "glimpse":
        return dataclasses.replace(Prune.from_config(vlm.glimpse_config), **changes)
    if "method" not in changes:
        raise GlimpseError("this model has no glimpse: name one (glimpse=...), choose another method (method=...), or set prune=false")
    return Prune(**changes)


class ChatModel:
    """Answers lmms-eval's requests.

    Model arguments: pretrained; glimpse; dtype; devices (number that share a batch, -1: all); prune (false: dense); max_visual_tokens and
    min_visual_tokens (per picture); system_prompt; adapter; and the fields of the keep rule: reduce_threshold, max_remain_ratio,
    fixed_remain_ratio, min_remain_num, method, after, seed. --batch_size is the number of questions per batch.
    """

    cache_hook: Any  # set by lmms-eval's base class, like task_dict
    task_dict: Any

    def __init__(
        self,
        pretrained: str,
        glimpse: str | None = None,
        dtype: str | None = None,
        devices: int = 1,
        prune: bool = True,
        max_visual_tokens: int | None = None,
        min_visual_tokens: int | None = None,
        system_prompt: str | None = None,
        adapter: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if unknown := set(options) - {*RULE, *IGNORED}:
            raise GlimpseError(f"model_args: gp_jax does not take {', '.join(sorted(unknown))} (of the keep rule: {', '.join(RULE)})")
        import jax

        from gp_jax.sharding import make_mesh
        from gp_jax.vlm import GlimpseVLM

        own = jax.local_devices()[: devices if devices > 0 else None]
        mesh = make_mesh(data=len(own), devices=own) if len(own) > 1 else None
        self.vlm = GlimpseVLM.from_pretrained(pretrained, glimpse, dtype, mesh=mesh, adapter=adapter)
        if max_visual_tokens or min_visual_tokens:
            self.vlm.processor = self.vlm.processor.limited(max_visual_tokens or 1 << 20, min_visual_tokens or 0)
        self.prune = prune_rule(self.vlm, prune, {name: options[name] for name in RULE if options.get(name) is not None})
        self.batch_size, self.system_prompt = int(options.get("batch_size") or 1), system_prompt
        self.kept = self.total = 0

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; requests with equal settings share batches."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(number)
        with Progress(total=len(requests), desc="answering", unit="answer", disable=getattr(self, "rank", 0) != 0) as bar:
            for numbers in groups.values():
                for start in range(0, len(numbers), self.batch_size):
                    part = numbers[start : start + self.batch_size]
                    settings = dict(requests[part[0]].args[2])
                    for number, text in zip(part, self.reply([self.messages(requests[n]) for n in part], settings), strict=True):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", (requests[number].args[0], settings), text)
                    bar.update(len(part))
        if self.total:
            print(f"gp_jax: {self.kept} of {self.total} visual tokens kept in the decode cache ({self.kept / self.total:.1%})")
        return answers

    def messages(self, request: Any) -> list[dict]:
        """The conversation of a request."""
        _, make, _, number, task, split = request.args
        conversation = make(self.task_dict[task][split][number])
        return ([{"role": "system", "content": self.system_prompt}] if self.system_prompt else []) + list(conversation)

    def reply(self, conversations: Sequence[Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]) -> list[str]:
        """A batch of answers. settings: lmms-eval's generation_kwargs. Raises: GlimpseError for unsupported ones."""
        prompts, images = zip(*map(self.prompt, conversations), strict=True)
        prepared = self.vlm.processor(images, prompts, rendered=True)
        done = self.vlm.generate(**prepared.inputs, prune=self.prune, **sampling(settings))
        self.kept += sum(int(keep.sum()) for keep in done.keep)
        self.total += sum(keep.size for keep in done.keep)
        return [stop(self.vlm.processor.text(tokens), settings.get("until")) for tokens in done.tokens]

    def prompt(self, conversation: Sequence[Mapping[str, Any]]) -> tuple[str, list]:
        """A conversation as text of the chat template, and its pictures."""
        images, turns = [], []
        for turn in conversation:
            parts = []
            for part in [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]:
                if part["type"] == "image":
                    images.append(part["url"])
                    parts.append({"type": "image"})
                elif part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                else:
                    raise GlimpseError(f"gp_jax takes text and still images, not {part['type']}")
            turns.append({"role": turn["role"], "content": parts})
        return self.vlm.processor.render(turns), images

    def loglikelihood(self, requests: Sequence[Any]) -> list:
        """Not supported; only tasks that generate text are."""
        raise NotImplementedError("gp_jax answers tasks of output_type generate_until")

    generate_until_multi_round = loglikelihood


def sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `GlimpseVLM.generate` from generation_kwargs, which use the names of Hugging Face."""
    if (settings.get("num_beams") or 1) != 1:
        raise GlimpseError(f"num_beams={settings['num_beams']}: gp_jax does not search with beams")
    temperature = 0.0 if settings.get("do_sample") is False else float(settings.get("temperature") or 0.0)
    found = dict(max_new_tokens=int(settings.get("max_new_tokens") or MAX_NEW_TOKENS), temperature=temperature)
    return found | {name: settings[name] for name in ("top_p", "top_k") if temperature and settings.get(name)}


def stop(text: str, until: str | Sequence[str] | None) -> str:
    """An answer up to the first stop string. Empty lines, lmms-eval's default stop string, are ignored, as its own chat models do."""
    for end in [until] if isinstance(until, str) else until or ():
        if end.strip():
            text = text.split(end)[0]
    return text.strip()
