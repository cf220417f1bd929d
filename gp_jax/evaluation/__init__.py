"""Evaluation: compares pruning plans by accuracy, kept evidence and cost, and reports the comparison."""
