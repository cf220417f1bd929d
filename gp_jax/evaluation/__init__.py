"""Metrics of answers and evidence, their statistics, and the report that people read."""
