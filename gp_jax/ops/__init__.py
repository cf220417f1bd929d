"""Rope, attention and small layers."""
