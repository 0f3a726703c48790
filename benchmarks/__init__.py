"""Comparisons with other process pools, side by side in one run."""
