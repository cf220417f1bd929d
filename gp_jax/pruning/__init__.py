"""Pruning by any method: plans, scorers, the keep rule, compaction."""
