"""What keeps stores and run folders in order: needless checkpoints, broken invariants, archives, second tries."""
