"""Whole runs: merge, compress, restore, sweep, soup, transplant, verify."""
