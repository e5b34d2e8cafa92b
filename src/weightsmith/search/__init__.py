"""Search for recipes: what is found by evaluating, or by following a gradient through a pool."""
