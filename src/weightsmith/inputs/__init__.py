"""Opening the models of a recipe, and giving them one vocabulary."""
