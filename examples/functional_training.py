"""A training loop of one's own on the functional core: AdamW by optax, no framework around it.

    python examples/functional_training.py [--steps 20]

Trains the demo's small system on drawn critters: a minute on two CPU cores, most of it for the
records and the compiler.
"""

import argparse
import dataclasses
import tempfile

import jax
import optax

from squeeze_jax import functional
from squeeze_jax.config import load_preset
from squeeze_jax.data.extraction import extract_features
from squeeze_jax.sharding import make_mesh
from squeeze_jax.training.batches import make_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--examples", type=int, default=256)
    given = parser.parse_args()

    # The demo's config on a few pairs.
    config = load_preset("demo")
    critters = dataclasses.replace(config.data.critters, train=given.examples, held_out=8)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, critters=critters))

    # Weights and an optimizer of our own.
    trained, frozen = functional.init(config, jax.random.key(0))
    warmup = given.steps // 4
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, warmup, given.steps))
    opt_state = optimizer.init(trained)

    @jax.jit
    def step(trained, opt_state, batch, key):
        loss, gradient = jax.value_and_grad(functional.loss)(trained, frozen, batch, key, config)
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, loss

    with tempfile.TemporaryDirectory() as folder:
        extract_features(config, folder)
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        batches, _ = make_batches(folder, None, config, mesh, rows=config.data.batch_per_chip)
        for number, batch in zip(range(given.steps), batches):
            key = jax.random.fold_in(jax.random.key(1), number)
            trained, opt_state, loss = step(trained, opt_state, batch, key)
            if number % 5 == 0 or number + 1 == given.steps:
                print(f"step {number}: loss {float(loss):.4f}")


if __name__ == "__main__":
    main()
