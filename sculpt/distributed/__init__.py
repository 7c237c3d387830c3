"""Training by several processes: what they tell each other, and who does what."""
