"""A small system and its pipeline, made once for each file of tests."""

import pytest
from small_sampling import CONFIG, NO_ENCODERS, random_system

from squeeze_jax.sampling.pipeline import Pipeline


@pytest.fixture(scope="module")
def system():
    return random_system(CONFIG)


@pytest.fixture(scope="module")
def pipeline(system):
    return Pipeline.of(system, CONFIG, NO_ENCODERS)
