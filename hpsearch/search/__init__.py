"""Optuna: what to try next, and what the sampler learns."""
