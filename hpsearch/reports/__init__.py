"""A study as figures, text and pages."""
