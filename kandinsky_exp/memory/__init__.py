"""Will a run fit, and what to set if not."""
