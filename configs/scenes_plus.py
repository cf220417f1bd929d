"""python train.py --config configs/scenes_plus.py"""

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
        sources=(DataSource(f"scenes:4000:{SMALL}"), DataSource("scenes:4000")),
        validation=(DataSource("scenes:96", split="val"),),
        shapes=4,
    ),
    masks=MasksConfig(kind="reference", after=4),
    policy=PolicyConfig(max_new_tokens=16, group_size=8),
    rewards=RewardConfig(terms=(RewardTerm("exact_match"),)),
    optim=OptimConfig(learning_rate=1e-3, schedule="constant", warmup_ratio=0.05, clip_norm=1.0),
    batch_size=8,
    accumulation=4,
    steps=200,
    remat=False,
    validate_every=50,
    save_every=50,
    keep=1,
)
