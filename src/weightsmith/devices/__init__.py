"""Accelerators, and the places that work is done at."""
