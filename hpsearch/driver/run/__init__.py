"""A study in flight: the events of its trials, what is written of them, how it is resumed and how it ends."""
