"""Pure rules: is this run overfitting, and which trials get past a rung."""
