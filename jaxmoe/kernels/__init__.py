"""Device kernels: one folder an operation, one file a backend."""
