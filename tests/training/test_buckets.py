"""Mixed sizes in training: a sample's loss does not know its bucket, grids are told apart,
photographs go the whole way."""

import dataclasses
import json
from contextlib import closing
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_encoders import LAYERS, WIDTH, FakeEncoders
from flax import nnx
from PIL import Image
from tiny import STAGE, randomised, row, tiny_batch, tiny_config

from squeeze_jax.config import CheckpointConfig, DataConfig, LogConfig, StageConfig, TrainingConfig
from squeeze_jax.data.buckets import Padding, shapes
from squeeze_jax.data.manifest import read_manifest
from squeeze_jax.data.pipeline import collate, make_dataset, to_batch
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.data.sources import ManifestRows
from squeeze_jax.diffusion.flow import schedule_shift, shift_time
from squeeze_jax.errors import InputError
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.training.loop import train
from squeeze_jax.training.state import split_system
from squeeze_jax.training.step import StepRandomness, compute_losses, sample_randomness
from squeeze_jax.training.validation import make_validation

SIZES = ((32, 32), (32, 48), (48, 32))
CONFIG = tiny_config(
    aggregator=AggregatorConfig(
        layers=tuple(range(LAYERS)),
        width=WIDTH,
        out_width=24,
        heads=2,
        mlp_width=24,
        refiner_blocks=1,
    ),
    data=DataConfig(height=32, width=32, buckets=SIZES, reference_long_side=32, batch_per_chip=1),
)
OPTIONS = {"target_size": (32, 32), "buckets": SIZES, "reference_long_side": 32}


@pytest.fixture(autouse=True)
def _optax_promotes():
    """Optax itself computes 0.9 ** (an integer count), which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Pictures as phones take them: lying, standing (by EXIF) and square, with up to two
    references."""
    folder = tmp_path_factory.mktemp("phone")
    turned = Image.Exif()
    turned[0x0112] = 6
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        size = ((80, 60), (64, 64), (120, 80))[i % 3]
        picture = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8))
        picture.save(folder / f"{i}.jpg", **({"exif": turned} if i % 4 == 1 else {}))
        references = [f"{j}.jpg" for j in range(i % 3) if j < i]
        rows.append(
            {"prompt": f"photograph {i}", "image_paths": references, "image_tgt_path": f"{i}.jpg"}
        )
    (folder / "pairs.json").write_text(json.dumps(rows))
    manifest = read_manifest(folder / "pairs.json", need_targets=True)
    # Validation on squares alone: a shape less to compile.
    for split, some in (("train", manifest.rows[:18]), ("held_out", manifest.rows[19::3])):
        extract(ManifestRows(some, split), FakeEncoders(), folder / split, source=split, **OPTIONS)
    return folder


def compiled_losses(config=CONFIG):
    graph, state = nnx.split(randomised(config))
    compiled = jax.jit(
        lambda state, batch, draws: compute_losses(
            nnx.merge(graph, state), batch, draws, config, STAGE
        )
    )
    return lambda batch, draws: np.asarray(compiled(state, batch, draws))


def fixed_draws(batch, t=0.4):
    rows, length, channels = batch.target.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.asarray(batch.index))
    noise = jax.vmap(lambda key: jax.random.normal(key, (length, channels)))(keys)
    keep = jnp.ones(rows, bool)
    return StepRandomness(jnp.full(rows, t), noise, keep, keep)


def test_a_samples_loss_does_not_know_its_buckets_padding_or_neighbours(photographs):
    run, source = compiled_losses(), FeatureSource(photographs / "train")
    by_tokens = {}
    for number in range(len(source)):
        record = source[number]
        by_tokens.setdefault(record.target.shape[0] * record.target.shape[1], []).append(record)
    assert len(by_tokens) == 2
    grids = {record.target.shape[:2] for record in by_tokens[4 * 6]}
    assert grids == {(4, 6), (6, 4)}, "lying and standing share a bucket"

    def loss(records, padding):
        batch = to_batch(collate(records, padding, with_grid=True))
        return run(batch, fixed_draws(batch))

    for some in ([by_tokens[4 * 4][0]], by_tokens[4 * 6][2:5:2]):
        wide = loss(some, Padding(40, 20, 30))
        for i, record in enumerate(some):
            tokens = sum(r.shape[0] * r.shape[1] // 4 for r in record.references)
            tight = Padding(record.text.shape[1], record.image.shape[1], tokens)
            np.testing.assert_allclose(loss([record], tight), wide[i : i + 1], rtol=1e-5)


def test_grids_of_equal_tokens_are_not_confused():
    config = tiny_config(data=dataclasses.replace(CONFIG.data, height=32, width=48))
    run, batch = compiled_losses(config), tiny_batch(mixed=False)
    target = np.random.default_rng(0).standard_normal((4, 6, 64)).astype(np.float32)
    batch = batch._replace(target=target)
    draws = fixed_draws(batch)
    static = run(batch, draws)
    told = run(batch._replace(grid=np.array([[2, 3]] * 4, np.int32)), draws)
    np.testing.assert_allclose(told, static, rtol=1e-6)
    mixed = batch._replace(grid=np.array([[2, 3], [3, 2], [6, 1], [1, 6]], np.int32))
    found = run(mixed, draws)
    for i in (1, 3):
        np.testing.assert_allclose(found[i], run(row(mixed, i), row(draws, i))[0], rtol=1e-5)
    difference = np.abs(found - static) / static
    assert difference[0] < 1e-6
    assert difference[1:].min() > 1e-4


def test_the_schedules_shift_follows_the_target():
    """The same draw of time, moved by the μ of as many tokens as the batch's targets have."""
    few, many = (
        np.asarray(sample_randomness(jax.random.key(0), (16, n, 64), CONFIG, STAGE).t)
        for n in (4, 1024)
    )
    # The shift undone.
    s = np.exp(-schedule_shift(4)) * few / (1 - few + np.exp(-schedule_shift(4)) * few)
    np.testing.assert_allclose(many, shift_time(s, schedule_shift(1024)), rtol=1e-5)
    assert np.all(many > few)


def test_as_many_programs_are_compiled_as_there_are_shapes(photographs):
    trained, split = split_system(randomised(CONFIG), CONFIG)
    validate = make_validation(split, CONFIG, STAGE)
    with closing(make_dataset(photographs / "train", batch=8, seed=0)) as batches:
        for batch in islice(batches, 6):
            assert np.all(np.isfinite(validate(trained, split.frozen, batch)))
        assert validate._cache_size() == shapes(batches.buckets) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Orbax, about restoring without shardings
def test_photographs_of_mixed_sizes_are_trained_on(photographs, tmp_path):
    config = dataclasses.replace(
        CONFIG,
        training=TrainingConfig(
            stages=(StageConfig(steps=3, references=True),), validate_every=4, sample_every=0
        ),
        checkpoint=CheckpointConfig(every=4),
        log=LogConfig(every=1, tensorboard=False),
    )
    said = []
    result = train(config, tmp_path, photographs, say=said.append)
    assert "18 records, 2 shapes of batch, " in said[0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert np.isfinite(result.validation)
    batches = make_dataset(photographs / "train", batch=8, seed=0)
    assert len({next(batches).target.shape for _ in range(3)}) == 2, "both shapes came"


def test_records_of_other_sizes_than_the_configs_are_refused(photographs, tmp_path):
    other = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, buckets=((32, 32), (48, 32)))
    )
    with pytest.raises(
        InputError,
        match=r"latents of targets are .*\(4, 6, 16\).*, this config wants \(4, 4, 16\), ",
    ):
        train(other, tmp_path, photographs, say=lambda text: None)
