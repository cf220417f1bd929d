"""A step of GRPO with LoRA written out in torch with transformers and PEFT, as trainers of the field take it.

Q questions, G completions of each, C tokens of a completion, T of a prompt.
"""

import json
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

EPSILON, EPSILON_HIGH, STD_EPSILON = 0.2, 0.28, 1e-4  # as in gp_jax's PolicyConfig


class TorchStep:
    """Samples with `generate`, then one teacher-forced pass with gradient over prompts and completions, a few questions at a time."""

    def __init__(self, model: Any, folder: Path, args: dict, learning_rate: float, reward: Callable, once: bool):
        """model: PEFT's; once: the frozen tower sees a picture once a step, else again for every completion in the pass with gradient."""
        self.model, self.args, self.reward, self.once = model, args, reward, once
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        tokenizer, processor = AutoTokenizer.from_pretrained(folder / "model"), Qwen2VLImageProcessorPil.from_pretrained(folder / "model")
        ids, self.pixels, grids = [], [], []
        for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
            found = processor(images=[Image.open(folder / "pictures" / row["image"])], return_tensors="pt")
            content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
            count = int(found["image_grid_thw"].prod()) // 4
            ids.append(tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")["input_ids"])
            self.pixels.append(found["pixel_values"])
            grids.append(found["image_grid_thw"])
        self.ids, self.grids = torch.cat(ids), torch.cat(grids)

    @torch.no_grad()
    def see(self) -> Any:
        """Features of all pictures; None: every pass makes its own."""
        if not self.once:
            return None
        return self.model.get_base_model().model.get_image_features(torch.cat(self.pixels), self.grids, return_dict=True)

    def inputs(self, ids: torch.Tensor, members: range, copies: int, features: Any) -> dict[str, Any]:
        """What the model takes. ids: (len(members) * copies, tokens)."""
        found = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        found["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        found["image_grid_thw"] = self.grids[members.start : members.stop].repeat_interleave(copies, 0)
        if features is None:
            return found | dict(pixel_values=torch.cat([self.pixels[question] for question in members for _ in range(copies)]))
        own = copy(features)
        own.pooler_output = [features.pooler_output[question] for question in members for _ in range(copies)]
        return found | dict(mm_encoder_outputs={"image": own})

    @torch.no_grad()
    def rollout(self, features: Any) -> torch.Tensor:
        """Returns: (Q G, C) int."""
        self.model.eval()
        count, tokens = len(self.pixels), self.args["new_tokens"]
        options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=self.args["group"], pad_token_id=0)
        inputs = self.inputs(self.ids, range(count), 1, features)
        options |= dict(suppress_tokens=[self.model.config.image_token_id])  # which a second pass would take for a picture
        out = self.model.generate(**inputs, **options, min_new_tokens=tokens, max_new_tokens=tokens)[:, self.ids.shape[1] :]
        assert out.shape == (count * self.args["group"], tokens), "every completion has the same length"
        return out

    def advantages(self, completions: torch.Tensor) -> torch.Tensor:
        """(Q G, C) -> (Q G,), within groups."""
        rewards = torch.tensor(self.reward(completion_ids=completions.tolist())).reshape(len(self.pixels), -1)
        return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + STD_EPSILON)).reshape(-1)

    def logp(self, completions: torch.Tensor, members: range, features: Any) -> torch.Tensor:
        """Log-probabilities of some questions' completions. Returns: (len(members) G, C)."""
        group, tokens = self.args["group"], completions.shape[1]
        own = completions[members.start * group : members.stop * group]
        ids = torch.cat([self.ids[members.start : members.stop].repeat_interleave(group, 0), own], dim=1)
        found = self.model(**self.inputs(ids, members, group, features), use_cache=False, logits_to_keep=tokens + 1)
        logits = found.logits[:, :-1]
        return logits.gather(-1, own[..., None])[..., 0] - logits.logsumexp(-1)

    def parts(self) -> list[range]:
        """Micro-batches."""
        return [range(start, start + self.args["micro"]) for start in range(0, len(self.pixels), self.args["micro"])]

    @torch.no_grad()
    def logprobs(self, completions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities without gradient. Returns: (Q G, C)."""
        features = self.see()
        self.model.eval()
        found = torch.cat([self.logp(completions, members, features) for members in self.parts()])
        if self.args["beta"]:
            with self.model.disable_adapter():
                for members in self.parts():
                    self.logp(completions, members, features)
        return found

    def update(self, completions: torch.Tensor, advantages: torch.Tensor, features: Any) -> None:
        """Gradients of all micro-batches, and AdamW."""
        self.model.train()
        self.adamw.zero_grad()
        for members in self.parts():
            own = advantages[members.start * self.args["group"] : members.stop * self.args["group"], None]
            logp = self.logp(completions, members, features)
            ratio = torch.exp(logp - logp.detach())
            loss = -torch.minimum(ratio * own, ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH) * own)
            if self.args["beta"]:
                with torch.no_grad(), self.model.disable_adapter():
                    reference = self.logp(completions, members, features)
                loss = loss + self.args["beta"] * (torch.exp(reference - logp) - (reference - logp) - 1)
            (loss.sum() / completions.numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()

    def __call__(self) -> dict[str, float]:
        """One step. Returns: seconds of its stages."""
        start = time.perf_counter()
        features = self.see()
        completions = self.rollout(features)
        rolled = time.perf_counter()
        advantages = self.advantages(completions)
        rated = time.perf_counter()
        self.update(completions, advantages, features)
        return dict(rollout=rolled - start, rewards=rated - rolled, update=time.perf_counter() - rated)
