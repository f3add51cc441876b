"""Is it better? Metrics of drawn pictures, and the report on them."""
