"""Vocabularies: reading them, giving models one in common, and moving a model to another tokenizer."""
