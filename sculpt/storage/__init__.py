"""What is on disk: files, weights, running tasks, checkpoints of runs."""
