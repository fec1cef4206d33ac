"""The parts of scripts/gpu_session: a parent that imports no jax, and the jobs that it starts."""
