"""Training: settings, losses, optimiser, step, loop."""
