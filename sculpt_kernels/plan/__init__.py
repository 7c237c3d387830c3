"""What projections cost on a device: arithmetic on shapes."""
