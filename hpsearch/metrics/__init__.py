"""Test scores as functions of per-example sums, with intervals and ties."""
