"""One preset per file."""
