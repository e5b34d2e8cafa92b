"""Samplers: where the next candidates lie, from what was found so far."""
