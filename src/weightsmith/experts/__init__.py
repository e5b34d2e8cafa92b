"""Mixtures of experts with fewer of them: left out, or merged."""
