"""Projections of a matrix away from a left and a right subspace."""
