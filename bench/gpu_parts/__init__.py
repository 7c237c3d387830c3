"""The parts of `bench.gpu` that do not fit beside each other in one file."""
