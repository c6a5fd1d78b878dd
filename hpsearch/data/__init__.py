"""Text to tokens: sources, splits, tokenizers, built-in corpora."""
