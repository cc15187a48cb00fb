"""Validation in closed form: five times, and noise that belongs to a record, not to its place in a
batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import STAGE, tiny_batch, tiny_config

from squeeze_jax.batch import Context
from squeeze_jax.models.system import System
from squeeze_jax.training.state import split_system
from squeeze_jax.training.validation import make_validation

CONFIG = tiny_config()


class Field(System):
    """A velocity that is a formula of x and t, and counts a kept condition as one each."""

    def __init__(self, formula):
        self.formula = formula
        self.aggregator = nnx.Dict(kernel=nnx.Param(jnp.zeros((1, 1))))

    def encoded(self, batch):
        return batch

    def aggregate(self, states):
        return Context(
            jnp.ones((states.text.shape[0], 1, 1)), jnp.ones((states.text.shape[0], 1), bool)
        )

    def velocity(self, target, target_grid, t, context, references, guidance=1.0, modulation=None):
        kept = jnp.any(context.mask, axis=1).astype(target.dtype) + jnp.any(
            references.mask, axis=1
        ).astype(target.dtype)
        return self.formula(target, t[:, None, None], kept[:, None, None])


def validated(formula, index, target=0.0):
    """Each row's validation loss, of records with these numbers and constant targets."""
    trained, split = split_system(Field(formula), CONFIG)
    batch = tiny_batch(rows=len(index), mixed=False)
    batch = batch._replace(
        index=np.array(index, np.int32), target=np.full_like(batch.target, target)
    )
    return np.asarray(
        make_validation(split, CONFIG, STAGE)(
            trained, split.frozen, jax.tree.map(jnp.asarray, batch)
        )
    )


def test_the_loss_is_the_mean_over_five_times():
    """Of an empty picture x_t = t·ε. With v = ε·(1 + t) the loss at t is t²·mean ε²; with v = 0 it
    is mean ε²."""
    index = [3, 8, 20]
    squares = validated(lambda x, t, kept: 0.0 * x, index)
    assert squares == pytest.approx(np.ones(3), abs=0.3), "ε is standard normal"
    times = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    for power in (1, 2, 3):
        loss = validated(lambda x, t, kept, power=power: x / t * (1.0 + t**power), index)
        np.testing.assert_allclose(loss, squares * np.mean(times ** (2 * power)), rtol=1e-5)


def test_all_conditions_are_kept():
    """With v = ε + the number of conditions, of an empty picture, the loss is its square."""
    np.testing.assert_allclose(
        validated(lambda x, t, kept: x / t + kept, [0, 1, 2, 3]), 4.0, rtol=1e-5
    )


def test_noise_follows_the_records_number_and_not_its_place():
    def by_number(*index):
        return validated(lambda x, t, kept: 0.0 * x, index)

    one = by_number(7, 11, 2, 30)
    np.testing.assert_allclose(by_number(30, 2, 11, 7), one[::-1], rtol=1e-6)
    np.testing.assert_allclose(by_number(2, 2), one[[2, 2]], rtol=1e-6)
    assert len(np.unique(one.round(5))) == 4
