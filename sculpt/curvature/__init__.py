"""What earlier tasks use, as second moments, and the directions that they leave free."""
