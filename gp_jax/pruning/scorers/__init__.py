"""Who ranks visual tokens at a cut: one file per method, each with its formula and paper. `plan.SCORERS` names them."""
