"""The folder of a run: claimed, resumed, found again, published."""
