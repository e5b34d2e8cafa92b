"""One file per way to keep several models in less space."""
