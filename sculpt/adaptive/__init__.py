"""Ranks that adapt to each layer: importance of layers, and preserved ranks under one budget."""
