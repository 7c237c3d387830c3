"""What projections and splits cost on a device: arithmetic on shapes."""
