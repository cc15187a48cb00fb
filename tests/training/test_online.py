"""On-line extraction: the encoders inside the program give what records of the same examples
give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from squeeze_jax.config import (
    Config,
    CrittersConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainingConfig,
)
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.online import make_online
from squeeze_jax.data.pipeline import make_dataset
from squeeze_jax.data.record_writer import Example, extract
from squeeze_jax.errors import InputError
from squeeze_jax.layers import attention
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.sharding import batch_sharding, current_mesh, make_mesh
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import create_params, initial_state, state_shardings
from squeeze_jax.training.step import compute_losses, make_train_step, sample_randomness
from squeeze_jax.training.validation import make_validation

STAGE = StageConfig(steps=4, references=True)
CONFIG = Config(
    name="small",
    model=ModelConfig(
        dit=DiTConfig(
            in_channels=32, context_width=32, pooled_width=8, heads=2, head_width=16,
            num_double_blocks=1, num_single_blocks=1, rope_axes=(4, 6, 6), guidance=False,
        ),
        latent_pixels=4, dtype="float32", frozen_dtype="float32",
    ),
    aggregator=AggregatorConfig(
        layers=(0, 1, 2, 4), width=128, out_width=32, heads=4, mlp_width=32, refiner_blocks=1
    ),
    lora=None,
    data=DataConfig(
        height=64, width=64, reference_long_side=64, online=True,
        critters=CrittersConfig(train=8, held_out=4),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    training=TrainingConfig(stages=(STAGE,)),
)  # fmt: skip


class Listed(list):
    """Examples in memory, with what on-line reading asks of a source."""

    source = "in memory"

    def prompt(self, index):
        return self[index].prompt

    def references(self, index):
        return len(self[index].references)

    def name(self, index):
        return f"row {index + 1}"

    prompts_are_valid = False


@pytest.fixture(scope="module", autouse=True)
def _optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def examples():
    """None, one, two references, and prompts of several lengths."""
    rng = np.random.default_rng(0)

    def picture():
        return Image.fromarray(
            rng.integers(0, 256, (64, 64, 3), np.uint8).repeat(2, 0).repeat(2, 1)
        )

    counts = (1, 2, 0, 2, 1, 2, 0, 2)
    return Listed(
        Example("a red critter " * (1 + i % 2), [picture() for _ in range(count)], picture())
        for i, count in enumerate(counts)
    )


@pytest.fixture(scope="module")
def batches(examples, tmp_path_factory):
    """The same examples as records and as they are."""
    folder = tmp_path_factory.mktemp("records")
    extract(
        examples, FeatureExtractor.of(CONFIG), folder, target_size=(64, 64), reference_long_side=64
    )
    records = make_dataset(folder, batch=8, seed=3, layers=CONFIG.aggregator.reads)
    raw = make_online(examples, CONFIG, batch=8, seed=3)
    taken = next(records), next(raw)
    records.close()
    raw.close()
    return taken


@pytest.fixture(scope="module")
def system():
    trained, split = create_params(CONFIG, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    rng = np.random.default_rng(1)
    trained = {
        k: jnp.asarray(v + 0.1 * rng.standard_normal(v.shape), v.dtype) for k, v in trained.items()
    }
    return trained, split


def test_the_program_makes_what_the_records_hold(batches, system):
    records, raw = batches
    np.testing.assert_array_equal(records.index, raw.index)
    trained, split = system
    made = jax.jit(lambda frozen, raw: split.merge(trained, frozen).encode_batch(raw))(
        split.frozen, raw
    )
    np.testing.assert_allclose(made.target, records.target, atol=2e-5)
    text, image, references = (
        records.hidden_states.text_mask,
        records.hidden_states.image_mask,
        records.references.mask,
    )
    for mine, theirs in (
        (made.hidden_states.text_mask, text),
        (made.hidden_states.image_mask, image),
        (made.references.mask, references),
    ):
        short = min(mine.shape[1], theirs.shape[1])
        np.testing.assert_array_equal(mine[:, :short], theirs[:, :short])
        assert not np.asarray(mine[:, short:]).any()
    for name, mask in (("text", text), ("image", image)):
        mine, theirs = (
            np.asarray(getattr(b.hidden_states, name), np.float32) for b in (made, records)
        )
        where = np.broadcast_to(mask[:, None, :, None], theirs.shape)
        mine = mine[:, :, : theirs.shape[2]]
        np.testing.assert_allclose(mine[where], theirs[where], rtol=1e-2, atol=1e-2)  # bf16
    np.testing.assert_allclose(made.references.tokens, records.references.tokens, atol=2e-5)
    np.testing.assert_array_equal(
        made.references.positions[references], records.references.positions[references]
    )


def test_losses_are_those_of_records(batches, system):
    records, raw = batches
    trained, split = system
    draws = sample_randomness(jax.random.key(0), (8, 64, 32), CONFIG, STAGE)
    both = [
        jax.jit(
            lambda frozen, b: compute_losses(split.merge(trained, frozen), b, draws, CONFIG, STAGE)
        )(split.frozen, b)
        for b in (records, raw)
    ]
    np.testing.assert_allclose(*both, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 8, 1)])
def test_on_a_mesh_the_same_step_is_made_and_encoders_never_move(batches, axes):
    _, raw = batches
    outcomes = []
    for mesh in (make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(*axes)):
        trained, split = create_params(CONFIG, mesh)
        assert not [name for name in trained if name.startswith("encoders")]
        sgd = optax.sgd(0.1)
        state = initial_state(trained, make_optimizer(CONFIG), CONFIG)._replace(
            opt_state=sgd.init(trained)
        )
        step = make_train_step(split, sgd, CONFIG, STAGE, state_shardings(state, mesh))
        batch = jax.device_put(raw, batch_sharding(mesh))
        validated = make_validation(split, CONFIG, STAGE, mesh)(state.params, split.frozen, batch)
        state, metrics = step(state, split.frozen, batch)
        outcomes.append((metrics.loss, validated, jax.device_get(state.params)))
    (loss, validated, one), (other, again, eight) = outcomes
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    np.testing.assert_allclose(validated, again, rtol=1e-5)
    for name in one:
        np.testing.assert_allclose(one[name], eight[name], rtol=1e-5, atol=2e-6, err_msg=name)


def test_step_and_validation_trace_the_encoders_on_their_mesh(batches, monkeypatch):
    """Their attention is a kernel on TPU, which cannot be partitioned from outside."""
    seen, plain = [], attention.plain_attention
    monkeypatch.setattr(
        attention, "plain_attention", lambda *given: (seen.append(current_mesh()), plain(*given))[1]
    )
    mesh = make_mesh(2, 4, 1)
    trained, split = create_params(CONFIG, mesh)
    raw = jax.tree.map(lambda x: np.concatenate([x] * 8)[:8], batches[1])
    state = jax.eval_shape(lambda: initial_state(trained, make_optimizer(CONFIG), CONFIG))
    for program in (
        lambda: jax.eval_shape(
            make_validation(split, CONFIG, STAGE, mesh), trained, split.frozen, raw
        ),
        lambda: make_train_step(
            split, make_optimizer(CONFIG), CONFIG, STAGE, state_shardings(state, mesh)
        ).trace(state, split.frozen, raw),
    ):
        seen.clear()
        program()
        # InternVL's eyes and language, the autoencoder, the aggregator, the transformer.
        assert len(seen) > 4
        assert set(seen) == {mesh.abstract_mesh}


def test_references_of_several_sizes_are_refused_by_row(examples):
    wide = Listed([*examples[:2], examples[2]._replace(references=[Image.new("RGB", (128, 64))])])
    batches = make_online(wide, CONFIG, batch=3, seed=0)
    with pytest.raises(InputError, match="row 3: a reference becomes 32x64 pixels, others 64x64"):
        next(batches)
    batches.close()
    with pytest.raises(InputError, match="no example has a reference"):
        make_online(Listed([examples[2]]), CONFIG, batch=1, seed=0)


def test_what_on_line_extraction_has_no_use_for_is_refused():
    for name, value in (("features", "x"), ("workers", 1)):
        with pytest.raises(InputError, match=f"data.online and data.{name}"):
            dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **{name: value}))
