"""Buckets: which sizes go together, each record once an epoch, the same bucket on every process, exact continuation."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
from fake_encoders import FakeEncoders, some_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from squeeze_jax.data.buckets import BucketSchedule, Sizes, make_buckets, shapes, waste
from squeeze_jax.data.images import nearest_size
from squeeze_jax.data.pipeline import make_dataset
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.diffusion.latents import grid_positions, pack, reference_positions
from squeeze_jax.errors import InputError

SIZES = ((64, 64), (48, 96), (96, 48))
PICTURES = ((64, 64), (100, 50), (50, 100), (90, 100), (40, 90))  # width, height
RECORDS = 47
OPTIONS = {"target_size": (64, 64), "buckets": SIZES, "reference_long_side": 64, "examples_per_shard": 16}


def mixed_examples(count):
    return [
        example._replace(target=Image.new("RGB", PICTURES[i * 7 % 5], (0, i, 0)))
        for i, example in enumerate(some_examples(count))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed")
    extract(mixed_examples(RECORDS), FakeEncoders(), out, **OPTIONS)
    return out


def flat(lists):
    return list(chain.from_iterable(lists))


def drawn(batches, count):
    return [batch.index.tolist() for batch in islice(batches, count)]


# Sizes


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((3000, 4000), (512, 704)),
        ((4000, 3000), (704, 512)),
        ((1000, 1000), (512, 512)),
        ((2000, 2000), (1024, 1024)),
        ((300, 300), (512, 512)),  # the smallest, where all would enlarge it
        ((1150, 1000), (512, 512)),
        ((100, 5000), (512, 704)),
    ],
)
def test_a_picture_goes_to_the_size_nearest_in_aspect_ratio(picture, size):
    assert nearest_size(*picture, [(512, 512), (1024, 1024), (512, 704), (704, 512)]) == size


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(deadline=None)
def test_no_other_size_would_cut_away_less(height, width):
    sizes = [(512, 512), (448, 576), (576, 448), (384, 704), (704, 384)]

    def kept(size):
        scale = max(size[0] / height, size[1] / width)
        return size[0] * size[1] / (height * scale * width * scale)

    assert kept(nearest_size(height, width, sizes)) >= max(map(kept, sizes)) - 1e-6


# Which records go together

TABLE = st.lists(
    st.builds(
        Sizes,
        st.sampled_from([8, 16]), st.sampled_from([8, 16]), st.integers(1, 9), st.integers(0, 9), st.integers(0, 3),
        st.integers(0, 20),
    ),
    min_size=4,
    max_size=40,
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TABLE, st.integers(1, 6))
def test_buckets_hold_every_record_once_with_room_for_each(sizes, batch):
    buckets = make_buckets(sizes, batch)
    assert sorted(flat(bucket.records.tolist() for bucket in buckets)) == list(range(len(sizes)))
    for bucket in buckets:
        for one in (sizes[number] for number in bucket.records):
            assert one.height // 2 * (one.width // 2) == bucket.target
            assert one.text <= bucket.padding.text
            assert one.image <= bucket.padding.image
            assert one.reference_tokens <= bucket.padding.references
        alone = len({b.target for b in buckets}) == len(buckets)
        assert alone or len(bucket.records) >= batch or [b.target for b in buckets].count(bucket.target) == 1
    assert 0 <= waste(buckets, sizes) < 1
    assert waste(buckets, sizes) <= waste(make_buckets(sizes, len(sizes)), sizes) + 1e-9, "one for each size wastes more"


def test_waste_and_shapes_by_hand():
    sizes = [Sizes(8, 8, 4, 0, 0, 0)] * 3 + [Sizes(8, 8, 2, 4, 1, 16), Sizes(8, 8, 4, 4, 1, 10)]
    buckets = make_buckets(sizes, 2)
    assert [(b.records.tolist(), b.target, *b.padding) for b in buckets] == [
        ([0, 1, 2], 16, 4, 0, 0),
        ([3, 4], 16, 4, 4, 16),
    ]
    assert shapes(buckets) == 2
    assert waste(buckets, sizes) == pytest.approx(1 - (3 * 20 + 38 + 34) / (3 * 20 + 2 * 40))
    (one,) = make_buckets(sizes, 3)
    assert one.padding == (4, 4, 16), "two records are too few for a step of three: they share"


# BucketSchedule


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 3))
def test_turns_are_gapless_and_in_proportion(counts, rows, seed):
    turns = BucketSchedule(counts, rows, seed)
    seen = [0] * len(counts)
    for step in range(200):
        bucket, batch = turns(step)
        assert batch == seen[bucket], "a bucket's batches come in order, none is left out"
        seen[bucket] += 1
    for epoch in range(4):
        total = sum(turns.before(epoch))
        of_epochs = Counter(turns(step)[0] for step in range(total))
        for bucket, count in enumerate(counts):
            assert of_epochs[bucket] == math.ceil(epoch * count / rows)
    assert turns(137) == BucketSchedule(counts, rows, seed)(137), "a function of seed and step alone"


def test_another_seed_gives_another_order():
    one, two = ([BucketSchedule([40, 60], 4, seed)(step)[0] for step in range(50)] for seed in (0, 1))
    assert one != two
    assert one != sorted(one)


# Batches


def test_every_batch_has_one_of_a_few_shapes_known_before(folder):
    batches = make_dataset(folder, batch=4, seed=0)
    source = FeatureSource(folder)
    seen = set()
    for batch in islice(batches, 40):
        states, references = batch.hidden_states, batch.references
        seen.add((batch.target.shape[1], states.text.shape[2], states.image.shape[2], references.tokens.shape[1]))
        for i, number in enumerate(batch.index.tolist()):
            record = source[number]
            grid = record.target.shape[0] // 2, record.target.shape[1] // 2
            assert batch.grid[i].tolist() == list(grid)
            np.testing.assert_array_equal(batch.target[i], pack(record.target))
            np.testing.assert_array_equal(states.text[i][:, states.text_mask[i]], record.text)
            grids = [(latent.shape[0] // 2, latent.shape[1] // 2) for latent in record.references]
            found = references.positions[i, references.mask[i]]
            np.testing.assert_array_equal(found, reference_positions(grid, grids))
    assert seen == {(bucket.target, *bucket.padding) for bucket in batches.buckets}
    assert len(seen) == shapes(batches.buckets) == 8
    assert batches.describe().startswith("47 records, 8 shapes of batch, ")


@pytest.mark.parametrize("rows", [[[0, 1], [2, 3]], [[3], [0, 1], [2]]])
def test_processes_share_the_rows_of_every_batch(folder, rows):
    whole = drawn(make_dataset(folder, batch=4, seed=5), 100)
    parts = [drawn(make_dataset(folder, batch=4, seed=5, rows=own), 100) for own in rows]
    for step, batch in enumerate(whole):
        assert [part[step] for part in parts] == [[batch[row] for row in own] for own in rows]


def test_an_epoch_of_the_whole_is_each_record_once(folder):
    """At one record a step, nothing runs over."""
    batches = make_dataset(folder, batch=1, seed=2)
    for _ in range(3):
        assert sorted(flat(drawn(batches, RECORDS))) == list(range(RECORDS))
    assert batches.epoch == RECORDS


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 60), st.integers(0, 20))
def test_a_restored_iterator_goes_on_identically(folder, before, elsewhere):
    options = {"batch": 3, "seed": 3, "rows": [0, 2]}
    original = make_dataset(folder, **options)
    list(islice(original, before))
    state = original.get_state()
    assert json.loads(state)["batches"] == before
    restored = make_dataset(folder, **options)
    list(islice(restored, elsewhere))
    restored.set_state(state)
    assert drawn(original, 12) == drawn(restored, 12)


WORKERS = """
import json, sys
if __name__ == "__mp_main__":  # a worker
    sys.modules["jax"] = None  # whoever needs it fails
    sys.stderr.write("worker\\n")
from squeeze_jax.data.pipeline import make_dataset

if __name__ == "__main__":
    batches = make_dataset(sys.argv[1], batch=4, seed=3, workers=3)
    batches.set_state(sys.argv[2].encode())
    print(json.dumps([[b.index.tolist(), b.grid.tolist(), b.references.tokens.shape] for b, _ in zip(batches, range(9))]))
"""


def test_workers_without_jax_continue_a_run_that_had_none(folder, tmp_path, request):
    batches = make_dataset(folder, batch=4, seed=3)
    list(islice(batches, 5))
    script = tmp_path / "main.py"
    script.write_text(WORKERS)
    environment = {**os.environ, "PYTHONPATH": str(request.config.rootpath), "JAX_PLATFORMS": "nowhere"}
    command = [sys.executable, "-W", "error", script, folder, batches.get_state().decode()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    grains_own = "WARNING:absl:Failed to load jax profiler: import of jax halted; None in sys.modules"
    assert done.returncode == 0, done.stderr
    assert "worker" in done.stderr
    assert not done.stderr.replace(grains_own, "").replace("worker", "").strip()
    expected = [[b.index.tolist(), b.grid.tolist(), list(b.references.tokens.shape)] for b in islice(batches, 9)]
    assert json.loads(done.stdout) == expected


def test_a_folder_of_one_size_keeps_one_shape_and_says_no_grid(tmp_path):
    extract(some_examples(12), FakeEncoders(), tmp_path, target_size=(64, 64), reference_long_side=64)
    batches = make_dataset(tmp_path, batch=2, seed=0)
    assert len(batches.buckets) == 1
    assert next(batches).grid is None
    with pytest.raises(InputError, match=r"target_size \[64, 64\] there and \[\[64, 64\], "):
        extract(some_examples(12), FakeEncoders(), tmp_path, **OPTIONS | {"examples_per_shard": 1024})


def test_positions_of_a_grid_told_by_the_batch_are_those_of_a_static_one():
    from squeeze_jax.models.backbone import target_positions

    grids = np.array([[2, 6], [6, 2], [3, 4], [12, 1]], np.int32)
    for grid, found in zip(grids, target_positions(grids, 12)):
        np.testing.assert_array_equal(found, grid_positions(*grid.tolist()))
