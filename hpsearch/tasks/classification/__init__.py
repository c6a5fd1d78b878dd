"""Text classification with one label or several: F1 and its relatives."""
