"""Between a weight and its coordinates in a pair of bases, and the layers that train them."""
