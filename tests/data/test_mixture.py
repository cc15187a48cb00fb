"""`data.mix`: shares follow the weights, one folder alone is as it was, and exact continuation."""

import dataclasses
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from fake_encoders import LAYERS, WIDTH, FakeEncoders, some_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config

from squeeze_jax.checkpoints.compatibility import check_same_run
from squeeze_jax.config import DataConfig, override
from squeeze_jax.config_json import from_json, to_json
from squeeze_jax.data.mixture import Mixture
from squeeze_jax.data.order import BLOCK, Order
from squeeze_jax.data.pipeline import buckets_of, make_dataset
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.errors import InputError
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.sharding import make_mesh
from squeeze_jax.training.batches import make_batches

COUNTS = {"large": 40, "small": 7, "captions": 5}
WEIGHTS = {"large": 1.0, "small": 3.0, "captions": 0.5}
SHARES = {name: weight / sum(WEIGHTS.values()) for name, weight in WEIGHTS.items()}
OPTIONS = {"target_size": (64, 64), "reference_long_side": 64}
SIZES = ((64, 64), (48, 96), (96, 48))


def examples_of(name, mixed):
    examples = some_examples(COUNTS[name])
    if mixed:
        shapes = ((64, 64), (96, 48), (48, 96))
        examples = [
            example._replace(target=Image.new("RGB", shapes[i * len(name) % 3], (0, i, 0)))
            for i, example in enumerate(examples)
        ]
    if name == "captions":
        examples = [one._replace(other_captions=("other", "another one")) for one in examples]
    return examples


def write(home, mixed):
    for name in COUNTS:
        buckets = {"buckets": SIZES} if mixed else {}
        extract(examples_of(name, mixed), FakeEncoders(), home / name, **OPTIONS, **buckets)
    return [(home / name, weight) for name, weight in WEIGHTS.items()]


@pytest.fixture(scope="module", params=[False, True], ids=["one size", "buckets"])
def folders(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("mix"), request.param)


def order_of(folders, batch, seed, rows=None):
    """Which records batches hold, without reading them; `test_rows_hold…` reads some."""
    mixture = Mixture(folders)
    buckets = buckets_of(mixture.summary(), batch)
    own = np.arange(batch) if rows is None else np.array(rows)
    return buckets, Order(buckets, batch, seed, own, mixture.starts, mixture.weights)


def drawn(order, count):
    return [order[step][1].tolist() for step in range(count)]


def leaves(batch):
    grid = [] if batch.grid is None else [batch.grid]
    return [batch.target, *batch.hidden_states, *batch.references, batch.index, *grid]


def assert_equal_batches(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def folder_of(mixture, number):
    return int(np.searchsorted(mixture.starts, number, side="right")) - 1


# Reading


def test_records_are_numbered_on_from_folder_to_folder(folders):
    mixture = Mixture(folders)
    assert len(mixture) == 40 + 7 + 3 * 5
    number = 0
    for folder, _ in folders:
        source = FeatureSource(folder)
        for own in range(len(source)):
            found, wanted = mixture[number], source[own]
            assert found.number == number
            assert found.prompt == wanted.prompt
            np.testing.assert_array_equal(found.text, wanted.text)
            number += 1
    summary = mixture.summary()
    assert summary.examples == sum(COUNTS.values())
    assert summary.max_text == max(FeatureSource(f).metadata.summary.max_text for f, _ in folders)


@pytest.mark.parametrize("seed", [0, 7])
def test_one_folder_alone_gives_the_batches_of_features_bit_for_bit(folders, seed):
    folder = folders[0][0]
    alone, mixed = (make_dataset(f, batch=4, seed=seed) for f in (folder, [(folder, 2.5)]))
    assert alone.get_state() == mixed.get_state()
    for one, other in zip(islice(alone, 15), islice(mixed, 15), strict=True):
        assert_equal_batches(one, other)
    assert alone.get_state() == mixed.get_state(), "so a run may go from one to the other"


def test_rows_hold_what_the_records_hold(folders):
    mixture, (_, order) = Mixture(folders), order_of(folders, 4, 1)
    for step, batch in enumerate(islice(make_dataset(folders, batch=4, seed=1), 12)):
        assert batch.index.tolist() == order[step][1].tolist()
        for row, number in enumerate(batch.index.tolist()):
            record, states = mixture[number], batch.hidden_states
            np.testing.assert_array_equal(states.text[row][:, states.text_mask[row]], record.text)
            assert batch.references.mask[row].sum() == sum(
                r.shape[0] * r.shape[1] // 4 for r in record.references
            )


# Shares


def test_shares_converge_to_the_weights(folders):
    """In one bucket each block has them to a row; over buckets, to a batch each an epoch."""
    mixture, batch = Mixture(folders), 8
    buckets, order = order_of(folders, batch, 2)
    numbers = np.array(drawn(order, 12 * BLOCK // batch)).ravel()
    names = np.searchsorted(mixture.starts, numbers, side="right") - 1
    for place, (name, share) in enumerate(SHARES.items()):
        own = np.cumsum(names == place)
        for count in (BLOCK, 4 * BLOCK, 12 * BLOCK):
            allowed = 2 if len(buckets) == 1 else batch * len(buckets) + 12
            assert abs(own[count - 1] - share * count) <= allowed, (name, count)
    first = names[:200].tolist()
    assert first != sorted(first), "they are shuffled"


def test_each_folder_is_gone_through_in_epochs_of_its_own(folders):
    """Every example once before one comes again, in each bucket; another order each time."""
    mixture = Mixture(folders)
    buckets, order = order_of(folders, 1, 3)
    numbers = [n for (n,) in drawn(order, 600)]
    for bucket in buckets:
        for place in range(len(folders)):
            examples = [n for n in bucket.records.tolist() if folder_of(mixture, n) == place]
            if not examples:
                continue
            ends = {n: n + (3 if place == 2 else 1) for n in examples}
            own = [e for n in numbers for e in examples if e <= n < ends[e]]
            epochs = [own[i : i + len(examples)] for i in range(0, len(own), len(examples))]
            assert all(sorted(epoch) == examples for epoch in epochs[:-1])
            if len(examples) > 3 and len(epochs) > 3:
                assert len(set(map(tuple, epochs[:-1]))) > 1
    by_caption = Counter(n for n in numbers if folder_of(mixture, n) == 2)
    assert len(by_caption) == 15, "every caption comes"


# Processes and resuming


@pytest.mark.parametrize("rows", [[[0, 1], [2, 3]], [[3], [0, 1], [2]]])
def test_processes_share_the_rows_of_every_batch(folders, rows):
    whole = drawn(order_of(folders, 4, 5)[1], 300)
    parts = [drawn(order_of(folders, 4, 5, own)[1], 300) for own in rows]
    for step, batch in enumerate(whole):
        assert [part[step] for part in parts] == [[batch[row] for row in own] for own in rows]


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 90), st.integers(0, 20))
def test_a_resumed_run_goes_on_as_if_it_had_not_been_stopped(folders, before, elsewhere):
    options = {"batch": 3, "seed": 3, "rows": [0, 2]}
    original = make_dataset(folders, **options)
    list(islice(original, before))
    state = original.get_state()
    restored = make_dataset(folders, **options)
    list(islice(restored, elsewhere))
    restored.set_state(state)
    for one, other in zip(islice(original, 10), islice(restored, 10), strict=True):
        assert_equal_batches(one, other)


def test_other_weights_or_folders_are_another_run(folders):
    state = make_dataset(folders, batch=4, seed=0).get_state()
    doubled = [(folder, 2 * weight) for folder, weight in folders]
    make_dataset(doubled, batch=4, seed=0).set_state(state)  # the same proportion
    other = [(folder, 1.0) for folder, _ in folders]
    with pytest.raises(InputError, match=r"weights was \[0\.2"):
        make_dataset(other, batch=4, seed=0).set_state(state)
    with pytest.raises(InputError, match="records was 62, is 47"):
        make_dataset(folders[:2], batch=4, seed=0).set_state(state)


# Configs and what does not go together


def test_the_command_line_and_a_runs_config_keep_it(tmp_path):
    config = override(tiny_config(), ["--data.mix", "a", "2", "b/c", "0.5"], "train.py")
    assert config.data.mix == (("a", 2.0), ("b/c", 0.5))
    assert from_json(to_json(config)) == config
    assert from_json(json.dumps({"name": "old"})).data.mix == ()
    assert check_same_run(tiny_config(), config, tmp_path) == [], (
        "the records say whether it goes on"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mix": (("a", 0.0),)}, "data.mix weighs a 0; a weight must be larger than 0"),
        ({"mix": (("a", float("nan")),)}, "data.mix weighs a nan"),
        ({"mix": (("a", float("inf")),)}, "data.mix weighs a inf"),
        ({"mix": (("a", 1.0), ("a", 2.0))}, "names a folder twice"),
        ({"mix": (("a", 1.0),), "features": "b"}, "data.mix and data.features are both set"),
        ({"mix": (("a", 1.0),), "online": True}, "data.online and data.mix are both set"),
    ],
)
def test_impossible_mixes_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        DataConfig(**changes)


def test_records_that_do_not_go_together_are_refused(folders, tmp_path):
    class Wider(FakeEncoders):
        def _encode(self, prompt, pictures):
            encoded = super()._encode(prompt, pictures)
            return encoded._replace(text=np.tile(encoded.text, 2), image=np.tile(encoded.image, 2))

    extract(some_examples(4), Wider(), tmp_path / "wide", **OPTIONS)
    with pytest.raises(
        InputError, match=r"differ \(8 and 16, 16 and 16\); extract them with one config"
    ):
        make_dataset([folders[0], (tmp_path / "wide", 1.0)], batch=2, seed=0)
    extract(some_examples(4), FakeEncoders("other"), tmp_path / "other", **OPTIONS)
    with pytest.raises(InputError, match="made by different encoders; extract them with one"):
        make_dataset([folders[0], (tmp_path / "other", 1.0)], batch=2, seed=0)
    extract(some_examples(4), FakeEncoders(), tmp_path / "two", **OPTIONS, layers=[0, 1])
    with pytest.raises(InputError, match="they hold different hidden states"):
        make_dataset([folders[0], (tmp_path / "two", 1.0)], batch=2, seed=0)
    both = make_dataset([folders[0], (tmp_path / "two", 1.0)], batch=2, seed=0, layers=[1])
    assert next(both).hidden_states.text.shape[1] == 1


def test_folders_of_one_size_each_are_a_set_of_several_sizes(tmp_path):
    for side in (64, 32):
        extract(
            some_examples(8),
            FakeEncoders(),
            tmp_path / str(side),
            **OPTIONS | {"target_size": (side, side)},
        )
    batches = make_dataset([(tmp_path / "64", 1.0), (tmp_path / "32", 1.0)], batch=2, seed=0)
    grids = {tuple(batch.grid[0].tolist()) for batch in islice(batches, 40)}
    assert grids == {(4, 4), (2, 2)}


def test_training_reads_the_mix_and_validates_on_it(tmp_path):
    for name, count in (("a", 6), ("b", 4)):
        for split in ("train", "held_out"):
            options = OPTIONS | {"target_size": (32, 32), "reference_long_side": 32}
            extract(some_examples(count), FakeEncoders(), tmp_path / name / split, **options)
    aggregator = AggregatorConfig(
        layers=tuple(range(LAYERS)),
        width=WIDTH,
        out_width=24,
        heads=2,
        mlp_width=24,
        refiner_blocks=1,
    )
    base = dataclasses.replace(tiny_config(), aggregator=aggregator)
    mesh = make_mesh(1, -1, 1, heads=2)

    def batches_of(features, *mix):
        data = dataclasses.replace(base.data, mix=tuple(mix))
        return make_batches(features, None, dataclasses.replace(base, data=data), mesh, 8)

    alone, held_out = batches_of(tmp_path / "a")
    mixed, held_out_of_mix = batches_of(tmp_path / "nothing", (str(tmp_path / "a"), 3.0))
    for one, other in zip(islice(alone, 5), islice(mixed, 5), strict=True):
        assert_equal_batches(one, other)
    for one, other in zip(held_out, held_out_of_mix, strict=True):
        assert_equal_batches(one, other)
    both, _ = batches_of(
        tmp_path / "nothing", (str(tmp_path / "a"), 1.0), (str(tmp_path / "b"), 1.0)
    )
    assert both.records == 10
    with pytest.raises(InputError, match="no held-out records"):
        batches_of(tmp_path / "a", (str(tmp_path / "a"), 1.0), (str(tmp_path / "c"), 1.0))
    for data in (alone, mixed, both):
        data.close()
