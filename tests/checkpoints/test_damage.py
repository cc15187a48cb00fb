"""Checkpoints: who samples from a damaged one reads one sentence, the clock decides nothing, and
what is restored is what was saved."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import tiny_config

from squeeze_jax.checkpoints.manager import (
    CHECKPOINTS,
    Checkpoints,
    Saved,
    read_weights,
    saved_base,
    saved_step,
    write_config,
)
from squeeze_jax.errors import InputError
from squeeze_jax.sharding import make_mesh
from squeeze_jax.training.state import TrainState, from_saved, to_saved

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Orbax, about shardings
CONFIG = tiny_config()


def state(step):
    leaves = {"a.kernel": jnp.arange(6.0).reshape(2, 3) + step}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, leaves, ({"mu": leaves},), dict(leaves), zero)


def save(folder, *steps, keep=2):
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, to_saved(state(step)), b"{}", Saved(CONFIG, "base", 1.0))
        checkpoints.wait()
    checkpoints.close()


@pytest.fixture
def folder(tmp_path):
    write_config(tmp_path, CONFIG)
    save(tmp_path, 1, 2)
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/_METADATA", "state"])
def test_whoever_samples_from_a_damaged_checkpoint_reads_one_sentence(folder, name):
    assert read_weights(folder)[2] == 2
    path = folder / CHECKPOINTS / "2" / name
    if path.is_dir():
        for part in path.rglob("*"):
            if part.is_file():
                cut(part)
    else:
        cut(path)
    with pytest.raises(InputError, match=r"newest checkpoint cannot be read .*one before") as said:
        read_weights(folder)
    assert "\n" not in str(said.value)


def test_what_a_checkpoint_says_of_its_run_is_guarded_too(folder):
    cut(folder / CHECKPOINTS / "2" / "run" / "metadata")
    with pytest.raises(InputError, match="the newest checkpoint cannot be read"):
        saved_base(folder)


def test_a_description_of_a_step_that_cannot_be_is_one_sentence(folder):
    path = folder / CHECKPOINTS / "2" / "_CHECKPOINT_METADATA"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"commit_timestamp_nsecs": 10**30}))
    with pytest.raises(InputError, match=r"cannot be listed .*move that step's folder away"):
        Checkpoints(folder, keep=2)
    with pytest.raises(InputError, match="cannot be read"):
        saved_step(folder)


def test_a_config_nested_without_end_is_one_sentence(folder):
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read as a config"):
        read_weights(folder)


def test_steps_are_in_order_whatever_the_clock_said(folder):
    """The first was saved tomorrow, by a clock that has been set back since."""
    path = folder / CHECKPOINTS / "1" / "_CHECKPOINT_METADATA"
    value = json.loads(path.read_text())
    later = {name: value[name] + 10**14 for name in value if name.endswith("timestamp_nsecs")}
    assert later
    path.write_text(json.dumps(value | later))
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.latest() == 2
    checkpoints.close()
    assert saved_step(folder) == 2
    save(folder, 3)
    assert sorted(int(path.name) for path in (folder / CHECKPOINTS).iterdir()) == [2, 3]
    np.testing.assert_array_equal(read_weights(folder)[1]["a.kernel"], state(3).params["a.kernel"])


def test_reading_leaves_a_run_alone(folder):
    """A folder that is sampled from may be on a disk that is read-only, or be written to."""
    unfinished = folder / CHECKPOINTS / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert read_weights(folder)[2] == 2
    assert unfinished.is_dir(), "it may be another process's save"
    assert jax.tree.leaves(read_weights(folder)[1])


@pytest.mark.parametrize("part", ["params", "opt_state", "ema_params"])
def test_a_state_with_a_leaf_that_the_checkpoint_lacks_is_refused(folder, part):
    """Neither zeros nor fresh values take its place."""
    wanted = state(2)
    more = {"b.kernel": jnp.ones(3)}
    there = ({"mu": wanted.opt_state[0]["mu"] | more},)
    leaves = there if part == "opt_state" else getattr(wanted, part) | more
    checkpoints = Checkpoints(folder, keep=2)
    found = from_saved(checkpoints.restore(2, to_saved(wanted)))  # what was saved comes back
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(ValueError, match=r"b\.kernel"):
        checkpoints.restore(2, to_saved(wanted._replace(**{part: leaves})))
    longer = wanted._replace(params={"a.kernel": jnp.ones((2, 4))})
    with pytest.raises(ValueError, match=r"\(2, 4\)"):  # nor is one cut or padded
        checkpoints.restore(2, to_saved(longer))
    checkpoints.close()


def test_a_step_right_after_a_save_does_not_reach_what_is_saved(tmp_path):
    """Its buffers are donated and written over while the save still runs."""
    write_config(tmp_path, CONFIG)
    large = jnp.arange(2.0**22)
    before = np.array(large)
    now = TrainState(jnp.int32(7), {"a": large}, (), {"a": large + 1.0}, jnp.int32(0))
    step = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(7, to_saved(now), b"{}", Saved(CONFIG, "base", 1.0))
    for _ in range(3):
        now = step(now)
    jax.block_until_ready(now)
    checkpoints.wait()
    found = from_saved(checkpoints.restore(7, to_saved(now)))
    checkpoints.close()
    np.testing.assert_array_equal(found.params["a"], before)
    np.testing.assert_array_equal(found.ema_params["a"], before + 1.0)
    assert int(found.step) == 7


@pytest.mark.parametrize("devices", [1, 2])
def test_fewer_devices_take_a_state_up_bit_for_bit_as_they_are_told(tmp_path, devices):
    """Saved in eight slices; where the new ones lie is asked for, not read from the checkpoint."""

    def placed(count):
        mesh = make_mesh(1, count, 1, devices=jax.devices()[:count])
        return NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())

    values = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    (cut, whole), (wanted, alone) = placed(8), placed(devices)
    leaves = {"a": jax.device_put(values, cut)}
    zero = jax.device_put(np.int32(3), whole)
    checkpoints = Checkpoints(tmp_path, keep=1)
    saved = TrainState(zero, leaves, {"mu": leaves}, leaves, zero)
    checkpoints.save(3, to_saved(saved), b"{}", Saved(CONFIG, "base", 1.0))
    checkpoints.wait()
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=wanted if leaf.ndim else alone
        ),
        saved,
    )
    found = from_saved(checkpoints.restore(3, to_saved(like)))
    checkpoints.close()
    for leaf in (found.params["a"], found.opt_state["mu"]["a"], found.ema_params["a"]):
        assert leaf.sharding == wanted
        np.testing.assert_array_equal(leaf, values)
    assert int(found.step) == 3 and found.step.sharding.device_set == alone.device_set
