"""Requests to answers: the engine of jitted programs, decoding, and the same stages as one traced function."""
