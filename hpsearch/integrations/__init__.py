"""Copies of a study for other tools."""
