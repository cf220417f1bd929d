"""Learning: losses, optimiser, step, loop."""
