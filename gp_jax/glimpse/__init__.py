"""The glimpse: its prompt rows, the importance predictor, the keep rule and compaction."""
