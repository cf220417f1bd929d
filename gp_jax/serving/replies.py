"""Answers as OpenAI's objects: a growing text with its stop strings, chunks of a stream, counts."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from gp_jax.processing.qwen import Processor
from gp_jax.serving.chat import Chat
from gp_jax.serving.jobs import Job, Started, Tokens
from gp_jax.serving.preparing import mask_of

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # at the end of a text: bytes of a character that is not whole yet


class Growing:
    """The text of an answer, which never shows what a later token could change, or what may be the begin of a stop string."""

    def __init__(self, processor: Processor, stops: Sequence[str]):
        self.processor, self.stops = processor, stops
        self.tokens: list[int] = []
        self.text, self.shown, self.stopped = "", 0, False

    def add(self, ids: np.ndarray) -> str:
        """Takes new tokens. Behind a stop string none is taken, so the same tokens count however they arrive. Returns: new text."""
        for part in [ids[k : k + 1] for k in range(len(ids))] if self.stops else [ids]:
            if self.stopped:
                break
            self.tokens += part.tolist()
            self.text = self.processor.text(np.array(self.tokens))
            ends = [place for place in map(self.text.find, self.stops) if place >= 0]
            if ends:
                self.text, self.stopped = self.text[: min(ends)], True
        return self._show(len(self.text) if self.stopped else self._safe())

    def rest(self) -> str:
        """What is left at the end."""
        return self._show(len(self.text))

    def _safe(self) -> int:
        """Characters that stay as they are whatever follows."""
        text = self.text.rstrip(UNFINISHED)
        held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return len(text) - held

    def _show(self, end: int) -> str:
        new, self.shown = self.text[self.shown : end], max(self.shown, end)
        return new


class Reply:
    """One answer on its way to its client."""

    def __init__(self, chat: Chat, job: Job, model: str, processor: Processor, ends: Sequence[int]):
        """ends: tokens that end an answer."""
        self.chat, self.job, self.model, self.processor, self.ends = chat, job, model, processor, set(ends)
        self.growing = Growing(processor, chat.stops)
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.started: Started | None = None
        self.logprobs: list[dict[str, Any]] = []

    def note(self, new: Tokens, before: int) -> list[dict[str, Any]]:
        """Entries for the tokens that were taken, those that end an answer left out. before: tokens that were there already."""
        if new.logprobs is None:
            return []
        fresh = []
        for k in range(len(self.growing.tokens) - before):
            if int(new.ids[k]) not in self.ends:
                top = zip(*(x[k, : self.chat.top_logprobs] for x in new.best), strict=True) if new.best else ()
                own = self._entry(new.ids[k], new.logprobs[k])
                fresh.append(own | {"top_logprobs": [self._entry(token, logprob) for token, logprob in top]})
        self.logprobs += fresh
        return fresh

    def _entry(self, token: np.integer, logprob: np.floating) -> dict[str, Any]:
        assert self.processor.tokenizer is not None, "prompts were tokenized"
        text = str(self.processor.tokenizer.decode([int(token)]))
        return {"token": text, "logprob": max(float(logprob), -9999.0), "bytes": list(text.encode())}

    @property
    def usage(self) -> dict[str, Any]:
        """Counts. seen_tokens: visual tokens that the tower saw; kept_tokens: those after pruning."""
        prompt, new = int(self.job.sample.ids.size), len(self.growing.tokens)
        started = self.started
        details = dict(cached_tokens=0, visual_tokens=self.job.sample.count)
        if started is not None:
            details |= dict(seen_tokens=details["visual_tokens"] if started.seen is None else started.seen)
            details |= dict(kept_tokens=int(started.keep.sum()), vision_cache_hits=started.seen_before)
        return dict(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, prompt_tokens_details=details)

    @property
    def mask(self) -> dict[str, Any]:
        """The field `mask`, where it was asked for."""
        if not self.chat.mask or self.started is None:
            return {}
        return {"mask": mask_of(self.job, self.started.keep, self.started.importance)}

    def whole(self, reason: str) -> dict[str, Any]:
        """The object of an answer that was not streamed."""
        message = {"role": "assistant", "content": self.growing.text, "refusal": None, **self.mask}
        logprobs = {"content": self.logprobs, "refusal": None} if self.chat.logprobs else None
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage}

    def chunk(self, delta: dict[str, Any], reason: str | None = None, entries: list | None = None) -> bytes:
        """One chunk of a stream."""
        logprobs = {"content": entries, "refusal": None} if entries else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        more = {"usage": None} if self.chat.usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def last(self) -> bytes:
        """What follows the last chunk."""
        counts = event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage}) if self.chat.usage else b""
        return counts + b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
