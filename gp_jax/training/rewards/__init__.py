"""Rewards of completions: named functions, functions of users, and a judge that is waited for."""
