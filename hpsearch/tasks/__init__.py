"""The tasks: of each a definition that is light to load, and what its trials compute. See `hpsearch.spec.task`."""
