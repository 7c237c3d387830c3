"""Certificates: the leak of a running task, and of two checkpoints."""
