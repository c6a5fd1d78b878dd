"""Instruction tuning: chat and prompt data, losses of the answers alone, scores of the answers that a model writes."""
