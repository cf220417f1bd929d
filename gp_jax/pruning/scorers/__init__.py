"""Scorers rank the visual tokens at a cut: one file per method, each with its formula and paper. `plan.SCORERS` is their table."""
