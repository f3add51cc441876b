"""The training loop and what happens in it: checkpoints, validation, metrics, EMA."""
