"""What a run said: samples.jsonl, and samples.html with pictures of what completions saw."""

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import jax
import numpy as np
from etils import epath

from gp_jax.errors import GlimpseError
from gp_jax.evaluation.reporting.gallery import picture_uri, safe
from gp_jax.evaluation.reporting.page import CSS
from gp_jax.processing.images import decode
from gp_jax.processing.qwen import Processor
from gp_jax.runtime.disk import MAX_JSON, kind_of, parse_json, read_bytes, write_text, writing
from gp_jax.training.plus.questions import Question
from gp_jax.training.plus.rollouts import Rollout
from gp_jax.training.rewards.rewarding import Rewarded

ON_PAGE = 60  # newest questions that samples.html shows
PER_STEP = 4  # questions of a step that are written

STYLE = """
.said { margin: .2rem 0; padding: .25rem .5rem; border-left: 3px solid var(--line); overflow-wrap: anywhere; }
.said.good { border-color: var(--right); } .said.bad { border-color: var(--wrong); } .said small { color: var(--soft); }
.question { display: grid; grid-template-columns: minmax(9rem, 16rem) 1fr; gap: .8rem; }
@media (max-width: 40rem) { .question { grid-template-columns: 1fr; } }
.question img { width: 100%; height: auto; }
"""


class Samples:
    """The samples of one run folder, written by the first process. A resumed run forgets those of steps that it takes again."""

    def __init__(self, folder: epath.Path, step: int):
        self.folder, self.file, self.page, self.lines = folder, folder / "samples.jsonl", folder / "samples.html", []
        if jax.process_index() or kind_of(self.file) is None:
            return
        for line in read_bytes(self.file, MAX_JSON).decode("utf-8", "replace").splitlines():
            try:
                entry = parse_json(line, self.file)
            except GlimpseError:  # a killed run may leave half a line
                continue
            if isinstance(entry, dict) and type(entry.get("step")) is int and entry["step"] < step:
                self.lines.append(entry)
        self._write()

    def add(
        self, step: int, rollout: Rollout, texts: Sequence[str], rewarded: Sequence[Rewarded], advantage: np.ndarray, processor: Processor
    ) -> None:
        """Adds some questions of a step with all their completions."""
        if jax.process_index():
            return
        group = len(texts) // max(1, len(rollout.questions))
        for place, question in list(enumerate(rollout.questions))[:PER_STEP]:
            own, mask = range(place * group, (place + 1) * group), rollout.masks[place]
            said = [
                {
                    "text": texts[i],
                    "reward": rewarded[i].total,
                    "terms": rewarded[i].terms,
                    "missing": rewarded[i].reason,
                    "advantage": round(float(advantage[i]), 4),
                    "tokens": len(rollout.tokens[i]),
                    "cut": rollout.cut[i],
                }
                for i in own
            ]
            record = question.record
            entry = {"step": step, "id": record.id, "dataset": record.dataset, "question": record.question, "answer": record.answer}
            entry |= {"kept": int(mask.sum()), "visual": int(mask.size), "completions": said}
            self.lines.append(entry | {"pictures": self._draw(f"{step:07d}_{place}", question, mask, processor)})
        self._write()

    def _draw(self, name: str, question: Question, mask: np.ndarray, processor: Processor) -> list[str]:
        """Writes every picture of a record, or view of one, with what was dropped dimmed. Returns: the files' names in the run folder."""
        record, first = question.record, 0
        names: list[str] = []
        views = [view for encoded in record.images for view in processor.views(decode(encoded, record.id))]
        for image, (rows, columns) in zip(views, question.sample.prompt.grids, strict=True):
            if min(image.size) > 0:
                uri = picture_uri(image, mask[first : first + rows * columns].reshape(rows, columns))
                path = self.folder / "samples" / f"{name}_{len(names)}.jpg"
                with writing(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(uri.partition(",")[2]))
                names.append(f"samples/{path.name}")
            first += rows * columns
        return names

    def _write(self) -> None:
        write_text(self.file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines))
        if self.lines:
            write_text(self.page, page(self.lines[-ON_PAGE:]))


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The page of some questions, the newest first."""
    cards = "".join(map(card, reversed(lines)))
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = "<title>Samples</title>"
    text = "What completions saw is bright; the bar beside each is green above the mean of its group and red below."
    return (
        f'{head}{title}<style>{CSS}{STYLE}</style></head><body><h1>Samples</h1><p class="caption">{escape(text)}</p>{cards}</body></html>\n'
    )


def card(line: dict[str, Any]) -> str:
    """One question with its completions."""
    images = "".join(f'<img loading="lazy" alt="what completions saw" src="{name}">' for name in line["pictures"])
    said = "".join(map(completion, line["completions"]))
    kept = f"{line['kept']} of {line['visual']} visual tokens"
    return (
        f'<article class="card"><header><h3>{safe(line["question"])}</h3><p>answer: <b>{safe(line["answer"])}</b> '
        f'<small class="id">step {line["step"] + 1}, {safe(line["id"])}, {kept}</small></p></header>'
        f'<div class="question"><div>{images}</div><div>{said}</div></div></article>'
    )


def completion(said: dict[str, Any]) -> str:
    """One completion."""
    kind = "good" if said["advantage"] > 0 else "bad" if said["advantage"] < 0 else ""
    terms = ", ".join(f"{name} {'missing' if value is None else f'{value:.3g}'}" for name, value in said["terms"].items())
    reward = f"missing ({safe(said['missing'])})" if said["reward"] is None else f"{said['reward']:.3g}"
    more = ", cut" if said["cut"] else ""
    text = f"<q>{safe(said['text'])}</q>" if said["text"].strip() else "<i>nothing</i>"
    return f'<div class="said {kind}">{text} <small>reward {reward} ({safe(terms)}), {said["tokens"]} tokens{more}</small></div>'
