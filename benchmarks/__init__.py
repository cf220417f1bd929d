"""Measurements against other implementations; each file says how it is run."""
