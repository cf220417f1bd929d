"""gp-jax train --config qwen2_5_vl_7b_plus

GlimpsePrune+ for Qwen2.5-VL-7B: reinforcement fine-tuning on pruned sequences with Visual-CoT's mixture of 23 entries of 1,000 questions.
Twelve are scored by a judge, eleven by exact match with the brief prompt, as released; docs/plus.md has the whole way. First prepare every
set as data/NAME, then start a judge behind an OpenAI-compatible endpoint:

    for name in cub docvqa dude flickr30k gqa infographicsvqa openimages sroie textcap textvqa visual7w vsr; do
      gp-jax prepare viscot_dataset/${name}_cot_train.jsonl --images viscot_images --out data/$name
    done
    vllm serve Qwen/Qwen2.5-32B-Instruct-GPTQ-Int8 --port 8000

The settings of the loss are ours (`policy`); those of the release are in configs/qwen2_5_vl_7b_plus_released.py.
"""

from gp_jax.data.settings import SHORT_ANSWER, DataConfig, DataSource
from gp_jax.evaluation.settings import JudgeConfig
from gp_jax.models.adapter import AdapterConfig
from gp_jax.training.plus.settings import MasksConfig, PlusConfig, PolicyConfig
from gp_jax.training.rewards.settings import RewardConfig, RewardTerm
from gp_jax.training.settings import OptimConfig

NAMES = ["cub", "docvqa", "dude", "flickr30k", "gqa", "infographicsvqa", "openimages", "sroie", "textcap", "textvqa", "visual7w", "vsr"]


def mixture(count: int = 1000) -> tuple[DataSource, ...]:
    """Every set twice with the same questions: free answers scored by the judge, brief ones by exact match (not of flickr30k)."""
    own = dict(sampling=f"random:{count}", seed=42)
    free = [DataSource(f"data/{name}", rewards=("judge",), **own) for name in NAMES]
    brief = [DataSource(f"data/{name}", suffix=SHORT_ANSWER, rewards=("precision_match",), **own) for name in NAMES if name != "flickr30k"]
    return (*free, *brief)


train = PlusConfig(
    model="Qwen/Qwen2.5-VL-7B-Instruct",
    dtype="bfloat16",
    out="runs/qwen2_5_vl_7b_plus",
    adapter=AdapterConfig(r=32, lora_alpha=64),
    data=DataConfig(sources=mixture(), max_prompt=6000, shapes=6),
    masks=MasksConfig(kind="reference", after=18),
    policy=PolicyConfig(),
    rewards=RewardConfig(
        terms=(RewardTerm("judge"),),
        judge=JudgeConfig(url="http://localhost:8000/v1", model="Qwen/Qwen2.5-32B-Instruct-GPTQ-Int8", at_once=32),
    ),
    optim=OptimConfig(learning_rate=2e-5, schedule="constant", warmup_ratio=0.05, clip_norm=1.0),
    batch_size=1,
    accumulation=8,
    epochs=1,
    save_every=100,
)
