"""Causal language modelling: perplexity and bits per byte of held-out text."""
