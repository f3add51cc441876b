"""MLflow, and the queue on disk before it."""
