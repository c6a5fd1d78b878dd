"""The study file: sections, search space, loading, checks."""
