"""Comparing methods on models and data of one's own: `weightsmith bench`."""
