"""A fingerprint of what a run leaves as it is: which base its trained weights belong to."""

import hashlib

import jax
import jax.numpy as jnp
from flax import nnx


def fingerprint(frozen: nnx.State) -> str:
    """16 hex digits of everything frozen: equal for equal bits, however they lie on devices.

    Integers wrap around exactly, so a weighted sum of an array's bits is the same in every order of
    adding.
    """
    leaves = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(frozen)
    }
    described = [
        (name, str(leaf.dtype), leaf.shape, int(_digest(leaf))) for name, leaf in leaves.items()
    ]
    return hashlib.sha256(repr(sorted(described)).encode()).hexdigest()[:16]


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    width = 8 * leaf.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32)
    weights = jnp.uint32(1)
    for axis, size in enumerate(
        bits.shape
    ):  # a number of its own for every place, odd so that no bit drops out
        weights = weights * jnp.uint32(size) + 2 * jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, axis
        )
    return jnp.sum(bits * (weights | jnp.uint32(1)), dtype=jnp.uint32)
