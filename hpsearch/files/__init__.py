"""The run folder: local or in an object store, logs, private scratch space."""
