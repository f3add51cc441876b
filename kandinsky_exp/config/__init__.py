"""What was typed, and a run's config.yaml, as one checked config. Imports no torch."""
