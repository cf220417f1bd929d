"""Generated pictures with questions whose evidence is known: a benchmark and training data that need no download."""
