"""Rotary position embeddings, attention, ranking and small layers."""
