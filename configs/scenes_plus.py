"""gp-jax train --config scenes_plus

GlimpsePrune+ on the bundled model: its answers are rewarded by exact match while it sees the annotated evidence only, or, for half of the
questions, what its own glimpse keeps. Then, as docs/plus.md has it, a glimpse for the merged model:

    gp-jax merge scenes --adapter runs/scenes_plus/export --to runs/scenes_plus/merged
    gp-jax train --config scenes_plus_glimpse
"""

from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.models.adapter import AdapterConfig
from gp_jax.training.plus.settings import MasksConfig, PlusConfig, PolicyConfig
from gp_jax.training.rewards.settings import RewardConfig, RewardTerm
from gp_jax.training.settings import OptimConfig

SMALL = "64-121"  # visual tokens: a third of the time of a usual picture

train = PlusConfig(
    model="scenes",
    out="runs/scenes_plus",
    adapter=AdapterConfig(r=16, lora_alpha=32),
    data=DataConfig(
        sources=(DataSource(f"scenes:6000:{SMALL}"), DataSource("scenes:10000")),
        validation=(DataSource("scenes:192", split="val"),),
        shapes=3,
    ),
    masks=MasksConfig(kind="reference", predicted_share=0.5),
    policy=PolicyConfig(group_size=8, max_new_tokens=16),
    rewards=RewardConfig(terms=(RewardTerm("exact_match"),)),
    optim=OptimConfig(learning_rate=5e-4, schedule="linear", warmup_ratio=0.02, end_ratio=0.1, clip_norm=1.0),
    batch_size=8,
    accumulation=8,
    steps=360,
    remat=False,
    log_every=10,
    samples_every=25,
    validate_every=60,
    save_every=25,
    keep=1,
)
