"""How networks lie to each other: permutations of units, barriers, partial merging."""
