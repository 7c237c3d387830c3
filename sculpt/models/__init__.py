"""Models as learners: how rows become tokens, losses and answers."""
