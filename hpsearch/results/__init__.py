"""What studies found: the leaderboard, comparisons, exports."""
