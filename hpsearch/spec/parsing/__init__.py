"""From the text of a study file to its content: YAML with places, the search space, W&B sweeps, the environment."""
