"""A population of LoRAs on one base, trained at once: `vmap` over stacked adapters.

    python examples/population_of_loras.py [--members 4]

Each member has its own random start and its own learning rate; base and batch are shared. Here on
random numbers in place of records: the loss of fitting one batch falls for each.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from squeeze_jax import functional
from squeeze_jax.batch import HiddenStates, References, TrainingBatch
from squeeze_jax.config import Config
from squeeze_jax.diffusion.latents import reference_positions
from squeeze_jax.interop.load import DEMO
from squeeze_jax.layers.lora import LoRAConfig


def random_batch(config: Config, key: jax.Array, rows: int = 4) -> TrainingBatch:
    """A batch of the right shapes: 6 text tokens, 4 image tokens, one reference."""
    (height, width), layers = config.target_grid, len(config.aggregator.reads)
    keys, channels = jax.random.split(key, 4), config.model.dit.in_channels
    shape = rows, layers, 6, config.aggregator.width
    text, image = (jax.random.normal(k, (*shape[:2], n, shape[3])) for k, n in zip(keys, (6, 4)))
    places = jnp.tile(jnp.arange(10), (rows, 1))
    mask = jnp.ones((rows, 10), bool)
    positions = jnp.tile(reference_positions((height, width), [(height, width)]), (rows, 1, 1))
    tokens = jax.random.normal(keys[2], (rows, height * width, channels))
    return TrainingBatch(
        jax.random.normal(keys[3], tokens.shape),
        HiddenStates(text, mask[:, :6], places[:, 4:], image, mask[:, :4], places[:, :4]),
        References(tokens, jnp.ones(tokens.shape[:2], bool), positions),
        jnp.arange(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()

    # One base for all, the shipped miniature; members differ in their adapters' random start.
    shipped, base, _ = functional.load(DEMO / "system")
    config = dataclasses.replace(shipped, lora=LoRAConfig(rank=4))
    keys = jax.random.split(jax.random.key(0), given.members)
    population, random_base = jax.vmap(lambda key: functional.init(config, key))(keys)
    frozen = {name: base.get(name, leaf[0]) for name, leaf in random_base.items()}
    for name in population.keys() & base.keys():  # the aggregator, which all begin with
        population[name] = jnp.broadcast_to(base[name], population[name].shape)
    rates = jnp.geomspace(1e-3, 1e-1, given.members)
    batch = random_batch(config, jax.random.key(1))

    def step(trained, rate, key):
        loss, gradient = jax.value_and_grad(functional.loss)(trained, frozen, batch, key, config)
        return jax.tree.map(lambda w, g: w - rate * g, trained, gradient), loss

    step = jax.jit(jax.vmap(step, (0, 0, None)))
    for number in range(given.steps):
        population, losses = step(population, rates, jax.random.key(2))
        if number in (0, given.steps - 1):
            print(f"step {number}: losses", " ".join(f"{float(loss):.4f}" for loss in losses))


if __name__ == "__main__":
    main()
