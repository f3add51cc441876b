"""Runs side by side: tables, curves and validation images."""
