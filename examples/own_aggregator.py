"""An aggregator of one's own in the system: any module from `HiddenStates` to a `Context`.

    python examples/own_aggregator.py

Here the plain mean over layers, then one matrix. Only its weights are trained; the transformer
below stays as it is.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from population_of_loras import random_batch

from squeeze_jax.array_types import Float
from squeeze_jax.batch import Context, HiddenStates
from squeeze_jax.checkpoints.trained import load_trained
from squeeze_jax.interop.load import DEMO
from squeeze_jax.layers.linear import Linear
from squeeze_jax.models.system import System
from squeeze_jax.training.step import compute_losses, sample_randomness, target_shape


class MeanOfLayers(nnx.Module):
    """The mean of all hidden states of a token, projected to the transformer's context."""

    def __init__(self, width: int, out_width: int, rngs: nnx.Rngs) -> None:
        self.out = Linear(width, out_width, rngs=rngs)

    def __call__(self, states: HiddenStates) -> Context:
        """Text tokens, then image tokens [B, Lt + Li, out_width], and which of them count."""
        pooled: Float[jax.Array, "B L C"] = jnp.concatenate(
            [states.text.mean(1), states.image.mean(1)], axis=1
        )
        return Context(self.out(pooled), jnp.concatenate([states.text_mask, states.image_mask], 1))


def main() -> None:
    shipped, rngs = load_trained(DEMO / "system"), nnx.Rngs(0)  # the miniature's transformer
    config = shipped.config
    aggregator = MeanOfLayers(config.aggregator.width, config.aggregator.out_width, rngs)
    system = System(aggregator, shipped.system.dit)  # pyright: ignore[reportArgumentType]
    batch, stage = random_batch(config, jax.random.key(1)), config.training.stages[0]

    mine = nnx.All(nnx.Param, nnx.PathContains("aggregator"))
    graphdef, trained, frozen = nnx.split(system, mine, ...)
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(trained)

    @jax.jit
    def step(trained, opt_state, key):
        def loss(trained):
            draws = sample_randomness(key, target_shape(batch, config), config, stage)
            whole = nnx.merge(graphdef, trained, frozen)
            return jnp.mean(compute_losses(whole, batch, draws, config, stage))

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(trained, updates), opt_state, value

    for number in range(10):
        trained, opt_state, value = step(trained, opt_state, jax.random.key(2))
        if number in (0, 9):
            print(f"step {number}: loss {float(value):.4f}")


if __name__ == "__main__":
    main()
