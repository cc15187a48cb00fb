"""The input pipeline: padding changes nothing, every record once an epoch, exact continuation."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import chain, islice

import ml_dtypes
import numpy as np
import pytest
from fake_encoders import FakeEncoders, some_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from squeeze_jax.batch import TrainingBatch
from squeeze_jax.data.pipeline import buckets_of, collate, make_dataset, to_batch
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.diffusion.latents import pack, reference_positions
from squeeze_jax.errors import InputError

RECORDS = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    options = {"target_size": (64, 64), "reference_long_side": 64, "examples_per_shard": 8}
    extract(some_examples(RECORDS), FakeEncoders(), out, **options)
    return out


def indices(batches, count):
    return [batch.index.tolist() for batch in islice(batches, count)]


def flat(lists):
    return list(chain.from_iterable(lists))


def leaves(batch):
    grid = [] if batch.grid is None else [batch.grid]
    return [batch.target, *batch.hidden_states, *batch.references, batch.index, *grid]


def assert_equal_batches(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# Batches


def test_a_batch_has_the_documented_fields(folder):
    batch = next(make_dataset(folder, batch=5, seed=0))
    sizes = FeatureSource(folder).metadata.summary
    assert isinstance(batch, TrainingBatch)
    states, references = batch.hidden_states, batch.references
    assert batch.target.shape == (5, 16, 64)
    assert states.text.shape == (5, 3, sizes.max_text, 8)
    assert states.image.shape == (5, 3, 12, 8)
    assert states.text.dtype == states.image.dtype == ml_dtypes.bfloat16
    assert references.tokens.shape == (5, sizes.max_reference_tokens, 64)
    assert references.positions.shape == (5, sizes.max_reference_tokens, 2)
    for mask, part in ((states.text_mask, sizes.max_text), (states.image_mask, 12)):
        assert mask.shape == (5, part)
        assert mask.dtype == bool
    assert {a.dtype for a in (batch.index, states.text_positions, references.positions)} == {np.dtype(np.int32)}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, RECORDS - 1), min_size=1, max_size=6))
def test_a_mixed_batch_equals_each_record_alone(folder, numbers):
    source = FeatureSource(folder)
    sizes = buckets_of(source.metadata.summary, 1)[0].padding
    records = [source[number] for number in numbers]
    batch = to_batch(collate(records, sizes))
    assert batch.index.tolist() == numbers
    for i, record in enumerate(records):
        assert_equal_batches(
            to_batch({name: array[i : i + 1] for name, array in collate(records, sizes).items()}),
            to_batch(collate([record], sizes)),
        )
        states, references = batch.hidden_states, batch.references
        np.testing.assert_array_equal(batch.target[i], pack(record.target))
        np.testing.assert_array_equal(states.text[i][:, states.text_mask[i]], record.text)
        np.testing.assert_array_equal(states.image[i][:, states.image_mask[i]], record.image)
        np.testing.assert_array_equal(states.text_positions[i, states.text_mask[i]], record.text_positions)
        tokens = [pack(latent) for latent in record.references]
        np.testing.assert_array_equal(
            references.tokens[i, references.mask[i]], np.concatenate([np.zeros((0, 64), np.float32), *tokens])
        )
        grids = [(latent.shape[0] // 2, latent.shape[1] // 2) for latent in record.references]
        np.testing.assert_array_equal(references.positions[i, references.mask[i]], reference_positions((4, 4), grids))
        for array, mask in (
            (states.text[i].swapaxes(0, 1), states.text_mask[i]),
            (states.image[i].swapaxes(0, 1), states.image_mask[i]),
            (references.tokens[i], references.mask[i]),
            (references.positions[i], references.mask[i]),
        ):
            assert not np.any(array[~mask]), "padding is zero"
            assert np.all(np.diff(mask.astype(int)) <= 0), "and stands at the end"


def test_text_only_data_has_no_reference_axis_to_speak_of(tmp_path):
    examples = [example._replace(references=[]) for example in some_examples(4)]
    extract(examples, FakeEncoders(), tmp_path, target_size=(64, 64), reference_long_side=64)
    batch = next(make_dataset(tmp_path, batch=3, seed=0))
    assert batch.references.tokens.shape == (3, 0, 64)
    assert batch.hidden_states.image.shape == (3, 3, 0, 8)


# Order


@pytest.mark.parametrize("rows", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 3], [1, 2]], [[3], [0], [2], [1]]])
def test_processes_read_their_rows_of_the_same_batches(folder, rows):
    """Whichever rows lie on whose devices; and every epoch holds each record once, in another order."""
    whole = indices(make_dataset(folder, batch=4, seed=5), 3 * RECORDS)
    parts = [indices(make_dataset(folder, batch=4, seed=5, rows=own), 3 * RECORDS) for own in rows]
    for step, batch in enumerate(whole):
        for own, part in zip(rows, parts):
            assert part[step] == [batch[row] for row in own]
    drawn = flat(whole)
    epochs = [drawn[i : i + RECORDS] for i in range(0, len(drawn), RECORDS)]
    assert all(sorted(epoch) == list(range(RECORDS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) == 12


def test_epochs_run_into_each_other(folder):
    batches = make_dataset(folder, batch=10, seed=0)
    drawn = flat(indices(batches, RECORDS))
    assert Counter(drawn) == dict.fromkeys(range(RECORDS), 10)
    assert len(next(make_dataset(folder, batch=50, seed=0)).index) == 50, "also within one batch"


def test_the_seed_decides_the_order(folder):
    first, again, other = (indices(make_dataset(folder, batch=4, seed=seed), 8) for seed in (1, 1, 2))
    assert first == again
    assert first != other


# State


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 20), st.integers(0, 20))
def test_a_restored_iterator_goes_on_identically(folder, before, elsewhere):
    original = make_dataset(folder, batch=4, seed=3, rows=[1, 3])
    list(islice(original, before))
    state = original.get_state()
    assert json.loads(state)["batches"] == before
    restored = make_dataset(folder, batch=4, seed=3, rows=[1, 3])
    list(islice(restored, elsewhere))
    restored.set_state(state)
    for a, b in zip(islice(original, 8), islice(restored, 8), strict=True):
        assert_equal_batches(a, b)
    assert original.get_state() == restored.get_state()


def test_position_zero_and_the_end_of_an_epoch(folder):
    batches = make_dataset(folder, batch=RECORDS, seed=0)
    start = batches.get_state()
    first, second = indices(batches, 2)
    assert sorted(first) == sorted(second) == list(range(RECORDS))
    batches.set_state(start)
    assert indices(batches, 1) == [first]
    end_of_epoch = batches.get_state()
    fresh = make_dataset(folder, batch=RECORDS, seed=0)
    fresh.set_state(end_of_epoch)
    assert indices(fresh, 1) == [second]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch": 5}, "batch was 4, is 5"),
    ],
)
def test_a_state_of_other_circumstances_is_refused(folder, changes, named):
    state = make_dataset(folder, batch=4, seed=0).get_state()
    other = make_dataset(folder, **{"batch": 4, "seed": 0} | changes)
    with pytest.raises(InputError, match=named):
        other.set_state(state)
    assert json.loads(other.get_state())["batches"] == 0


def test_a_state_of_other_records_or_of_nothing_is_refused(folder, tmp_path):
    extract(some_examples(RECORDS), FakeEncoders("other"), tmp_path, target_size=(64, 64), reference_long_side=64)
    state = make_dataset(tmp_path, batch=4, seed=0).get_state()
    batches = make_dataset(folder, batch=4, seed=0)
    with pytest.raises(InputError, match="data was"):
        batches.set_state(state)
    for broken in (b"", b"[]", b"{}"):
        with pytest.raises(InputError, match="not the state"):
            batches.set_state(broken)


def test_another_number_of_processes_goes_on_where_one_stopped(folder):
    one = make_dataset(folder, batch=4, seed=0)
    list(islice(one, 7))
    wanted = indices(one, 8)
    one.set_state(json.dumps(json.loads(one.get_state()) | {"batches": 7}).encode())
    for own in ([0, 1], [2, 3]):
        part = make_dataset(folder, batch=4, seed=0, rows=own)
        part.set_state(one.get_state())
        assert indices(part, 8) == [[batch[row] for row in own] for batch in wanted]


# Workers

WORKERS = """
import json, sys
from squeeze_jax.data.pipeline import make_dataset

if __name__ == "__main__":
    batches = make_dataset(sys.argv[1], batch=4, seed=3, workers=2)
    seen = [next(batches).index.tolist() for _ in range(9)]
    batches.set_state(json.dumps(json.loads(batches.get_state()) | {"batches": 4}).encode())
    seen += [next(batches).index.tolist() for _ in range(5)]
    print(json.dumps(seen))
"""


def test_spawned_workers_give_the_same_batches(folder, tmp_path, request):
    script = tmp_path / "main.py"
    script.write_text(WORKERS)
    environment = {**os.environ, "PYTHONPATH": str(request.config.rootpath)}
    environment["JAX_PLATFORMS"] = "nowhere"  # whoever touches JAX fails, here and in the workers
    done = subprocess.run(
        [sys.executable, "-W", "error", script, folder],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = indices(make_dataset(folder, batch=4, seed=3), 9)
    assert json.loads(done.stdout) == expected + expected[4:9]
