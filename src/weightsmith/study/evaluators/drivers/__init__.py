"""Scripts that run in another environment; nothing here is imported."""
