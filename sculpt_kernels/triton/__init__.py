"""What the Triton kernels share: device code, tile sizes, launches."""
