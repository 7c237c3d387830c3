"""Task sequences: configuration, loop, checkpoints, run directories."""
