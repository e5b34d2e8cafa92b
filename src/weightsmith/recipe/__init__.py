"""The recipe: its grammar, reading it with lines, resolving values, mergekit's dialect."""
