"""The training loop in one process: resumed equals uninterrupted, stage 2 from stage 1, what is
refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_encoders import LAYERS, WIDTH, FakeEncoders, some_examples
from tiny import tiny_config
from training_runs import final_state

from squeeze_jax.checkpoints.compatibility import check_same_run
from squeeze_jax.checkpoints.manager import (
    CHECKPOINTS,
    Checkpoints,
    read_config,
    read_weights,
    write_config,
    write_weights,
)
from squeeze_jax.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    StageConfig,
    TrainingConfig,
)
from squeeze_jax.config_json import from_json, to_json
from squeeze_jax.data.record_writer import extract
from squeeze_jax.errors import InputError
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.training import start
from squeeze_jax.training.loop import train
from squeeze_jax.training.step import sample_randomness, step_key

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # Orbax, about restoring without shardings


@pytest.fixture(scope="module", autouse=True)
def _optax_promotes():
    """Optax itself computes 0.9 ** (an integer count), which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    for split, count in (("train", 12), ("held_out", 8)):
        extract(
            some_examples(count),
            FakeEncoders(),
            out / split,
            target_size=(32, 32),
            reference_long_side=32,
        )
    return out


def config(*stages: StageConfig, **changes):
    return tiny_config(
        aggregator=AggregatorConfig(
            layers=tuple(range(LAYERS)),
            width=WIDTH,
            out_width=24,
            heads=2,
            mlp_width=24,
            refiner_blocks=1,
        ),
        data=DataConfig(height=32, width=32, reference_long_side=32, batch_per_chip=1),
        training=TrainingConfig(stages=stages, validate_every=2, sample_every=0),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1, tensorboard=False),
        **changes,
    )


BOTH = config(StageConfig(steps=2, references=False), StageConfig(steps=2, references=True))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def values(workdir, name):
    return {line["step"]: line[name] for line in lines(workdir) if name in line}


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def whole(features, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(BOTH, workdir, features, say=lambda text: None)


def stop_at(step):
    def sample(split, leaves, at):
        if at == step:
            raise StoppedError

    return sample


def test_two_steps_saved_resumed_and_two_more_equal_four(whole, features, tmp_path):
    straight, result = whole
    interrupted = dataclasses.replace(
        BOTH, training=dataclasses.replace(BOTH.training, sample_every=2)
    )
    with pytest.raises(StoppedError):
        train(interrupted, tmp_path, features, sample=stop_at(2), say=lambda text: None)
    said = []
    again = train(BOTH, tmp_path, features, say=said.append)
    assert any("from step 2" in text for text in said)
    assert "learning rate 0.01 (adamw, constant)" in said
    assert again.step == result.step == 4
    assert again.validation == result.validation
    for name, leaf in result.params.items():
        np.testing.assert_array_equal(again.params[name], leaf, err_msg=name)
    for name in ("loss", "learning_rate", "validation_loss", "grad_norm"):
        assert values(tmp_path, name) == values(straight, name), name


def test_a_finished_run_started_again_changes_nothing(whole, features):
    workdir, result = whole
    before = lines(workdir)
    again = train(BOTH, workdir, features, sample=stop_at(4), say=lambda text: None)
    assert again.step == 4
    assert again.validation == result.validation
    assert lines(workdir) == before
    for name, leaf in result.params.items():
        np.testing.assert_array_equal(again.params[name], leaf)


def test_a_run_stopped_behind_its_last_step_makes_up_for_validation_and_pictures(whole, features):
    workdir, result = whole
    rows = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "validation_loss" in rows[-1]
    (workdir / "metrics.jsonl").write_text("".join(rows[:-1]))
    drawn = []
    again = train(
        BOTH,
        workdir,
        features,
        sample=lambda split, leaves, step: drawn.append(step),
        say=lambda text: None,
    )
    assert drawn == [4]
    assert again.validation == result.validation
    assert (workdir / "metrics.jsonl").read_text().splitlines(keepends=True) == rows


def test_the_average_is_what_is_returned_and_read_back(whole):
    workdir, result = whole
    _, leaves, step = read_weights(workdir)
    assert step == 4
    assert leaves.keys() == result.params.keys()
    for name, leaf in result.params.items():
        np.testing.assert_array_equal(leaves[name], leaf)


def test_what_eight_devices_saved_is_read_on_one(whole):
    workdir, result = whole
    assert len(jax.devices()) == 8
    script = f"""
import json, sys, pathlib, jax
from squeeze_jax.checkpoints.manager import read_weights
assert jax.device_count() == 1
_, leaves, _ = read_weights(pathlib.Path({str(workdir)!r}))
json.dump({{name: leaf.ravel().tolist() for name, leaf in leaves.items()}}, sys.stdout)
"""
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == result.params.keys()
    for name, leaf in result.params.items():
        np.testing.assert_array_equal(np.float32(found[name]), np.ravel(leaf), err_msg=name)


def test_another_config_is_refused_and_what_it_may_change_is_not(whole, features):
    workdir, _ = whole
    other = dataclasses.replace(
        BOTH, optimizer=dataclasses.replace(BOTH.optimizer, learning_rate=1e-3)
    )
    with pytest.raises(InputError, match=r"optimizer\.learning_rate: 0\.01 → 0\.001"):
        train(other, workdir, features, say=lambda text: None)
    free = dataclasses.replace(BOTH, sampling=dataclasses.replace(BOTH.sampling, steps=3))
    assert train(free, workdir, features, say=lambda text: None).step == 4


@pytest.mark.telling
@pytest.mark.slow
def test_changes_go_on_when_told_so_and_never_those_of_size(whole, features):
    workdir, _ = whole
    said = []
    slower = dataclasses.replace(
        BOTH, optimizer=dataclasses.replace(BOTH.optimizer, learning_rate=1e-3)
    )
    assert train(slower, workdir, features, accept_changes=True, say=said.append).step == 4
    assert "changed: optimizer.learning_rate: 0.01 → 0.001" in said
    wider = dataclasses.replace(BOTH, aggregator=dataclasses.replace(BOTH.aggregator, mlp_width=32))
    with pytest.raises(
        InputError, match=r"aggregator\.mlp_width: 24 → 32.*these decide its arrays"
    ):
        train(wider, workdir, features, accept_changes=True, say=lambda text: None)
    shuffled = dataclasses.replace(BOTH, training=dataclasses.replace(BOTH.training, seed=1))
    with pytest.raises(InputError, match=r"training\.seed: 0 → 1.*the order of its records"):
        train(shuffled, workdir, features, accept_changes=True, say=lambda text: None)
    write_config(workdir, BOTH)


@pytest.mark.telling
@pytest.mark.slow
def test_a_run_whose_rate_and_steps_are_changed_goes_on_with_the_new_ones(features, tmp_path):
    """From where it was, and no step is done again. The last stage, now of three steps, warms up
    over two; a stage of two steps has only one to warm up in."""
    with_pictures = dataclasses.replace(BOTH.training, sample_every=2)
    interrupted = dataclasses.replace(BOTH, training=with_pictures)
    with pytest.raises(StoppedError):
        train(interrupted, tmp_path, features, sample=stop_at(2), say=lambda text: None)
    first, second = BOTH.training.stages
    stages = (first, dataclasses.replace(second, steps=3))
    changed = dataclasses.replace(
        BOTH,
        optimizer=dataclasses.replace(BOTH.optimizer, learning_rate=1e-3),
        training=dataclasses.replace(BOTH.training, stages=stages),
    )
    said = []
    again = train(changed, tmp_path, features, accept_changes=True, say=said.append)
    assert again.step == 5
    rates = values(tmp_path, "learning_rate")
    assert list(rates) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(list(rates.values()), [1e-2, 1e-2, 5e-4, 1e-3, 1e-3], rtol=1e-6)
    assert "changed: optimizer.learning_rate: 0.01 → 0.001" in said
    assert f"continuing {tmp_path} from step 2" in said


def test_a_run_goes_on_only_with_the_base_it_began_with(whole, features, monkeypatch):
    workdir, _ = whole
    monkeypatch.setattr(start, "fingerprint", lambda frozen: "another")
    with pytest.raises(
        InputError,
        match=r"was trained on another base .fingerprint [0-9a-f]{16}, this one's is another",
    ):
        train(BOTH, workdir, features, accept_changes=True, say=lambda text: None)


@pytest.mark.slow
def test_some_checkpoints_stay_and_chosen_steps_are_traced(features, tmp_path):
    kept = config(StageConfig(steps=4, references=True))
    kept = dataclasses.replace(
        kept,
        checkpoint=CheckpointConfig(every=1, keep=1, keep_every=2),
        log=dataclasses.replace(kept.log, profile=(2, 3)),
    )
    train(kept, tmp_path, features, say=lambda text: None)
    assert sorted(int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir()) == [2, 4]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


NOT_NOW = [
    MemoryError("devices"),
    OSError(5, "Input/output error"),
    jax.errors.JaxRuntimeError("full"),
]


@pytest.mark.parametrize("error", NOT_NOW, ids=lambda error: type(error).__name__)
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(
    whole, features, monkeypatch, error
):
    workdir, _ = whole

    def restore(*arguments):
        raise error

    monkeypatch.setattr(Checkpoints, "restore", restore)
    with pytest.raises((InputError, type(error)), match=r"cannot be read now|devices|full"):
        train(BOTH, workdir, features, say=lambda text: None)
    assert (workdir / CHECKPOINTS / "4").is_dir()
    assert not (workdir / "damaged").exists()


def test_the_folders_of_frozen_weights_may_move():
    for name in ("dit_weights", "autoencoder", "mllm"):
        moved = dataclasses.replace(
            BOTH, model=dataclasses.replace(BOTH.model, **{name: "/mnt/elsewhere"})
        )
        assert check_same_run(BOTH, moved, Path("work")) == []


@pytest.mark.telling
@pytest.mark.slow
def test_stage_two_from_stage_ones_weights(whole, features, tmp_path):
    rng = np.random.default_rng(0)
    start = {
        name: rng.standard_normal(leaf.shape).astype(np.float32)
        for name, leaf in whole[1].params.items()
    }
    write_weights(tmp_path / "one", BOTH, start, np.float32)
    said = []
    one_step = config(StageConfig(steps=1, references=True))
    result = train(
        one_step, tmp_path / "two", features, start_from=tmp_path / "one", say=said.append
    )
    assert any(
        line.startswith(f"starting from the weights of {tmp_path / 'one'}: ") for line in said
    )
    # Adam's first step moves a weight by the learning rate at most, and decay by 1e-4.
    for name, leaf in start.items():
        np.testing.assert_allclose(result.params[name], leaf, atol=0.011, err_msg=name)
        assert not np.array_equal(result.params[name], leaf)


ONE, TWO = (config(stage) for stage in BOTH.training.stages)


@pytest.fixture(scope="module")
def apart(features, tmp_path_factory):
    """Both stages in runs of their own, the second one with `--from`."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    train(ONE, one, features, say=lambda text: None)
    return one, two, train(TWO, two, features, start_from=one, say=lambda text: None)


@pytest.mark.telling
@pytest.mark.slow
def test_two_stages_in_one_run_equal_two_runs(whole, apart):
    """Bit for bit: weights, average, moments, losses, rates, and the place in the records."""
    straight, result = whole
    one, two, last = apart
    for name, leaf in result.params.items():
        np.testing.assert_array_equal(last.params[name], leaf, err_msg=name)
    for name in ("loss", "grad_norm", "learning_rate", "validation_loss"):
        of_both = values(one, name) | {step + 2: value for step, value in values(two, name).items()}
        assert of_both == values(straight, name), name
    (_, state, place), (_, of_two, there) = final_state(straight), final_state(two)
    assert place == there
    schedules = {path for path in state if path.endswith("count") and state[path] != of_two[path]}
    assert len(schedules) == 1, "the schedule's step: it counts the run's"
    for path in state.keys() - schedules - {"/step"}:
        np.testing.assert_array_equal(state[path], of_two[path], err_msg=path)


@pytest.mark.telling
@pytest.mark.slow
def test_stage_two_draws_other_numbers_and_records_than_stage_one(apart):
    one, two, _ = apart
    began = read_config(two)
    assert began.training.steps_before == 2

    def draws(config):
        return sample_randomness(step_key(config, 0), (64, 4, 16), config, TWO.training.stages[0])

    first, second = draws(ONE), draws(began)
    for name, drawn in first._asdict().items():
        assert not np.array_equal(drawn, getattr(second, name)), name
    assert final_state(two)[2]["batches"] == 4, "after the two batches of stage 1"
    assert final_state(one)[2]["batches"] == 2


@pytest.mark.telling
@pytest.mark.slow
def test_a_run_from_another_resumes_with_its_own_draws(apart, features, tmp_path):
    """Also where --from is not given again; a config without the count, as old ones are, has 0."""
    one, two, last = apart
    interrupted = dataclasses.replace(
        TWO,
        training=dataclasses.replace(TWO.training, sample_every=1),
        checkpoint=CheckpointConfig(every=1),
    )
    with pytest.raises(StoppedError):
        train(
            interrupted,
            tmp_path,
            features,
            start_from=one,
            sample=stop_at(1),
            say=lambda text: None,
        )
    again = train(TWO, tmp_path, features, say=lambda text: None)
    for name, leaf in last.params.items():
        np.testing.assert_array_equal(again.params[name], leaf, err_msg=name)
    assert read_config(tmp_path) == read_config(two)


def test_an_old_runs_folder_has_its_old_draws():
    old = json.loads(to_json(BOTH))
    del old["training"]["steps_before"]
    read = from_json(json.dumps(old))
    assert read == BOTH
    key = jax.random.fold_in(jax.random.key(read.training.seed), 7)
    assert jax.random.key_data(step_key(read, 7)).tolist() == jax.random.key_data(key).tolist()


def test_weights_with_a_missing_leaf_are_refused(whole, features, tmp_path):
    _, result = whole
    leaves = dict(result.params)
    leaves.pop("dit.img_in.kernel")
    write_weights(tmp_path / "short", BOTH, leaves)
    with pytest.raises(InputError, match=r"dit\.img_in\.kernel is missing"):
        train(
            BOTH, tmp_path / "work", features, start_from=tmp_path / "short", say=lambda text: None
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": dataclasses.replace(BOTH.data, height=48)},
            r"latents of targets are \(4, 4, 16\).*\(6, 4, 16\)",
        ),
        (
            {"aggregator": dataclasses.replace(BOTH.aggregator, width=16)},
            "width of hidden states are 8.*wants 16",
        ),
        (
            {"aggregator": dataclasses.replace(BOTH.aggregator, layers=(0, 3))},
            "hidden states 0 to 2.*layer",
        ),
    ],
)
def test_records_of_another_config_are_refused(features, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(BOTH, **changes), tmp_path, features, say=lambda text: None)
    assert not (tmp_path / CHECKPOINTS).exists()


def test_more_steps_than_records_are_done(whole):
    workdir, _ = whole
    assert sorted(values(workdir, "loss")) == [1, 2, 3, 4]  # 8 rows a step out of 12 records
