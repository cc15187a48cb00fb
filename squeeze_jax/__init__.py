"""squeeze_jax: subject-driven image generation in JAX."""

__version__ = "0.1.0"
