"""What a step does to the weights: optimizers, learning rates, averages."""
