"""gp-jax train --config scenes_plus

GlimpsePrune+ on the bundled model, behind the warm start of configs/scenes_plus_sft.py: answers are rewarded by exact match, and read
what a glimpse keeps. Then, as docs/plus.md has it, a glimpse for the merged model:

    gp-jax merge scenes --adapter runs/scenes_plus/export --to runs/scenes_plus/merged
    gp-jax train --config scenes_plus_glimpse
"""

from configs.scenes_plus_sft import SMALL, mixture
from configs.scenes_plus_sft import train as first
from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.training.plus.settings import MasksConfig, PlusConfig, PolicyConfig
from gp_jax.training.rewards.settings import RewardConfig, RewardTerm
from gp_jax.training.settings import OptimConfig

train = PlusConfig(
    model="scenes",
    glimpse_from="scenes-looks",
    adapter=first.adapter,
    adapter_from="runs/scenes_plus_sft/export",
    out="runs/scenes_plus",
    data=DataConfig(sources=mixture(400, SMALL), validation=(DataSource(f"scenes:192:{SMALL}", split="val"),), shapes=1),
    masks=MasksConfig(kind="predicted"),
    policy=PolicyConfig(group_size=8, max_new_tokens=16),
    rewards=RewardConfig(terms=(RewardTerm("exact_match"),)),
    optim=OptimConfig(learning_rate=1e-3, schedule="linear", warmup_ratio=0.05, end_ratio=0.1, clip_norm=1.0),
    batch_size=16,
    accumulation=4,
    steps=120,
    remat=False,
    log_every=10,
    samples_every=25,
    validate_every=60,
    save_every=20,
    keep=1,
)
