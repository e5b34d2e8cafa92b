"""Statistics of models on data, and checks that a model works."""
