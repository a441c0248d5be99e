"""Device functions that generated kernels import."""
