"""Fine-tuning under pruning: rollouts, rewards, group-relative policy gradients; and supervised answers on the same parts."""
