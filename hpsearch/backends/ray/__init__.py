"""Trials on Ray Tune, and studies as jobs of a Ray cluster."""
