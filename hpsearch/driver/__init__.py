"""A study in flight: its state machine, lease, outbox, retention and repair."""
