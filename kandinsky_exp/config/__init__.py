"""What was typed → a checked config: validation asks schema and types, allowlist, targets, consistency. No torch."""
