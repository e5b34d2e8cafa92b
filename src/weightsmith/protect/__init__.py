"""Locks on models, how strong they are, and what is strange about models of strangers."""
