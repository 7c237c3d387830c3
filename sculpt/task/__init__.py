"""A task on one model: what trains, how weights follow, and what is refused meanwhile."""
