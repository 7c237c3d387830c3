"""Leading and trailing singular subspaces of a matrix."""
