"""What sampling is told and in which order: scales by stage, the schedule, references, and the noise level of cached ones.

Most systems here have a velocity that is a formula, so that a whole run of the pipeline is known in closed form.
"""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_encoders import FakeEncoders, some_examples
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_sampler import sample_naively
from parity import relative_error
from PIL import Image
from tiny import randomised, row, tiny_batch, tiny_config

from squeeze_jax.batch import Context, References
from squeeze_jax.config import load_preset
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.pipeline import make_dataset
from squeeze_jax.data.record_writer import Example, extract
from squeeze_jax.diffusion.latents import reference_positions
from squeeze_jax.models.backbone import Backbone, BlockInputs, Modulation
from squeeze_jax.models.system import System
from squeeze_jax.planning.sampler_program import evaluations
from squeeze_jax.sampling.batching import pad_references
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import make_schedule, noise_for

CONFIG = tiny_config()
ROOT = Path(__file__).parents[2]
GRID, TOKENS = (2, 2), 4
STATES = row(tiny_batch(mixed=False).hidden_states, 0)
LATENTS = [np.random.default_rng(0).standard_normal((4, 4, 16)).astype(np.float32)]


class FieldBackbone(Backbone):
    """The same velocity for a first-block cache: blocks that do nothing, and the formula behind them."""

    config = CONFIG.model.dit

    def __init__(self, velocity):
        self.field = velocity

    def embed_inputs(self, target, target_grid, temb, context, context_mask=None, references=None):
        context, hidden = (jnp.zeros((*x.shape[:2], self.config.width)) for x in (context, target))
        return (context, hidden), BlockInputs(temb, (references, target), context_mask, None)

    def apply_blocks(self, streams, inputs, start=0, stop=None):
        return streams

    def predict_velocity(self, hidden, inputs):
        references, target = inputs.rope
        t = jnp.broadcast_to(inputs.temb.final[0][:, 0, 0], target.shape[:1])
        return self.field(target, GRID, t, Context(None, inputs.mask), references)


class Field(System):
    """A velocity that is a formula of x, t, and of which conditions have tokens that are not masked out."""

    def __init__(self, formula):
        self.formula, self.dit = formula, FieldBackbone(self.velocity)
        self.unused = nnx.Param(jnp.zeros(()))  # a pipeline looks where its weights lie

    def aggregate(self, states):
        return Context(jnp.ones((states.text.shape[0], 1, 1)), jnp.ones((states.text.shape[0], 1), bool))

    def make_modulation(self, times, guidance=1.0):
        return Modulation((), (), (times[:, None, None],))

    def prepare_references(self, references, guidance=1.0):
        return references

    def velocity(self, target, target_grid, t, context, references, guidance=1.0, modulation=None):
        def some(mask):
            return jnp.any(mask, axis=1).astype(target.dtype)[:, None, None]

        vae = jnp.zeros((len(target), 1, 1)) if references is None else some(references.mask)
        return self.formula(target, t[:, None, None], some(context.mask), vae)


def pipeline(formula, **sampling):
    config = dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, **sampling))
    return Pipeline.of(Field(formula), config, object.__new__(FeatureExtractor))


def times_by_hand(steps, tokens, shifted):
    """docs/decisions.md, "Schedule and solver"."""
    s = 1.0 - np.arange(steps + 1) / steps
    factor = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)) if shifted else 1.0
    return factor * s / (factor * s + 1.0 - s)


def formula(x, t, mllm, vae):
    return 0.3 * x + 0.5 * t + mllm * (1.0 + 0.2 * x) + vae * jnp.cos(3.0 * t)


def by_hand(x, t, mllm, vae):
    return 0.3 * x + 0.5 * t + mllm * (1.0 + 0.2 * x) + vae * np.cos(3.0 * t)


# --- guidance and schedule ---------------------------------------------------------------------------------------------


SCALES = [(1.5, 3.0, 6.0), (6.0, 1.5, 3.0), (1.0, 4.0, 2.0), (3.0, 1.0, 1.0)]


@pytest.mark.parametrize("threshold", [0.0, 1e-9], ids=["plain", "first-block cache"])
@pytest.mark.parametrize("scales", SCALES)
def test_each_stage_has_a_scale_of_its_own(scales, threshold):
    """Against the naive sampler, and in float64: v_u + s·(v_c − v_u) with the s of the step's stage."""
    steps = 9
    settings = Settings(steps=steps, tau1=0.8, tau2=0.4, cfg_scale=scales, first_block_threshold=threshold)
    drawn = pipeline(formula).sample(STATES, [LATENTS], [5, 6], settings)
    noise = noise_for([5, 6], TOKENS, 64)
    schedule = make_schedule(steps, TOKENS, 0.8, 0.4, references=True)
    shown = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), 2, axis=0), pad_references([LATENTS], GRID))
    states = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), 2, axis=0), STATES)
    naive = sample_naively(Field(formula), noise, GRID, states, shown, schedule, jnp.asarray(scales))
    assert relative_error(drawn, naive) < 1e-5

    x, times, stages = np.asarray(noise, np.float64), times_by_hand(steps, TOKENS, True), []
    for t, t_next in pairwise(times):
        stage = 0 if t >= 0.8 else 1 if t >= 0.4 else 2
        stages.append(stage)
        bare, own = by_hand(x, t, 0, 0), by_hand(x, t, stage < 2, stage > 0)
        x = x + (t_next - t) * (bare + scales[stage] * (own - bare))
    assert set(stages) == {0, 1, 2}
    assert relative_error(drawn, x) < 1e-5


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("references", [True, False], ids=["references", "text only"])
def test_the_configs_schedule_is_the_samplers(shifted, references):
    """v = t: the sum of Δt·t over the schedule, which tells shifted times from even ones."""
    own = pipeline(lambda x, t, mllm, vae: x * 0.0 + t, shifted=shifted, steps=5)
    settings, tokens = Settings(height=256, width=256, cfg_scale=1.0), 256
    drawn = own.sample(STATES, [LATENTS if references else []], [5], settings)
    both = {kind: times_by_hand(5, tokens, kind) for kind in (True, False)}
    sums = {kind: np.sum(np.diff(times) * times[:-1]) for kind, times in both.items()}
    np.testing.assert_allclose(drawn, noise_for([5], tokens, 64) + sums[shifted], atol=1e-5)
    assert abs(sums[True] - sums[False]) > 0.005


def test_a_schnell_preset_samples_in_four_even_steps_without_guidance():
    sampling = load_preset(ROOT / "configs" / "flux_schnell.py").sampling
    own = pipeline(lambda x, t, mllm, vae: x * 0.0 + t + 10.0 * (mllm + vae), **dataclasses.asdict(sampling))
    drawn = own.sample(STATES, [[]], [5])
    np.testing.assert_allclose(drawn, noise_for([5], TOKENS, 64) - (1 + 0.75 + 0.5 + 0.25) / 4 - 10.0, atol=1e-5)
    schedule = own.resolved(Settings()).make_schedule(own.config, references=True)
    assert schedule.stage_names(4) == ["MLLM", "MLLM + VAE", "VAE", "VAE"]


def test_the_plan_counts_the_evaluations_that_are_made():
    """At the config's own size, where its thresholds have moved: 0.95 and 0.85 at 1,024 tokens."""
    sampling = dataclasses.replace(CONFIG.sampling, steps=25, tau1=0.95, tau2=0.85, tau_tokens=1024)
    config = dataclasses.replace(CONFIG, sampling=sampling)
    odds = [tau / (1 - tau) * (TOKENS / 1024) ** 0.5 for tau in (0.95, 0.85)]
    tau1, tau2 = (value / (1 + value) for value in odds)
    t = times_by_hand(25, TOKENS, True)[:-1]
    mllm, both, vae = (t >= tau1).sum(), ((t >= tau2) & (t < tau1)).sum(), (t < tau2).sum()
    stages = [((True, False), mllm), ((True, True), both), ((False, True), vae)]
    assert min(mllm, both, vae) > 0
    assert evaluations(config, references=1) == [*stages, ((False, False), 25)]
    assert evaluations(config, references=0) == [((True, False), 25), ((False, False), 25)]


PERCENT = st.integers(0, 110)


@settings(deadline=None)
@given(st.integers(1, 30), PERCENT, PERCENT, st.booleans())
def test_a_stage_that_is_meant_and_has_no_step_is_named(steps, a, b, shifted):
    """Meant: some time in (0, 1] lies in it, here looked for in steps of 0.005."""
    tau1, tau2 = max(a, b) / 100, min(a, b) / 100
    own = pipeline(formula, shifted=shifted)
    asked = own.resolved(Settings(steps=steps, tau1=tau1, tau2=tau2))

    def stage(t):
        return "MLLM" if t >= np.float32(tau1) else "MLLM + VAE" if t >= np.float32(tau2) else "VAE"

    begun = {stage(t) for t in np.float32(times_by_hand(steps, TOKENS, shifted)[:-1])}
    meant = {stage(t) for t in np.float32(np.arange(1, 201) / 200)}
    said = asked.empty_stages(own.config, references=True)
    assert {sentence.split(":")[0] for sentence in said} == {f"no step has {name}" for name in meant - begun}
    assert asked.empty_stages(own.config, references=False) == []


def test_whoever_draws_is_warned_of_a_stage_without_steps(monkeypatch):
    own = dataclasses.replace(pipeline(formula, shifted=False), encoders=Listening())
    picture, few = Image.new("RGB", (32, 32)), Settings(steps=4, tau1=0.95, tau2=0.85)
    said = r"no step has MLLM \+ VAE: none of 4 begins at 0\.85 ≤ t < 0\.95; take more steps or move tau1 and tau2"
    with pytest.warns(UserWarning, match=said):
        assert next(own.stream("one", [picture], few)).stage == "MLLM"
    monkeypatch.setattr(Pipeline, "draw", lambda self, batches: iter([np.zeros((1, 32, 32, 3))]))
    with pytest.warns(UserWarning, match=said):
        own("one", [picture], few)
    own("one", [], few)


# --- references --------------------------------------------------------------------------------------------------------


class Listening(FeatureExtractor):
    """Notes what the MLLM is given; a latent is its picture, every eighth pixel."""

    def __init__(self):
        self.heard = []

    def read(self, prompts, images):
        self.heard += [[np.asarray(image)[0, 0].tolist() for image in of_prompt] for of_prompt in images]
        return STATES

    def latents(self, images, canvas=None):
        return [np.asarray(image)[::8, ::8] for image in images]


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_references_keep_their_order_on_both_ways():
    """A prompt speaks of the first and the second picture: the MLLM and the transformer see them in that order."""
    encoders = Listening()
    own = dataclasses.replace(pipeline(formula), encoders=encoders)
    colours = [[RED, GREEN, BLUE], [BLUE, RED]]
    _, latents = own.encode(["one", "two"], [[Image.new("RGB", (32, 32), c) for c in of_prompt] for of_prompt in colours])
    assert encoders.heard == [[list(c) for c in of_prompt] for of_prompt in colours]
    seen = [[np.rint(127.5 * (latent[0, 0] + 1)).tolist() for latent in of_prompt] for of_prompt in latents]
    assert seen == encoders.heard


@pytest.mark.parametrize("longest", [32, 48, 64])
def test_references_are_as_long_as_the_config_says_at_most(longest):
    """80 x 160 pixels keep their aspect ratio, to the nearest multiple of 16."""
    own = dataclasses.replace(pipeline(formula), encoders=Listening())
    own.config = dataclasses.replace(own.config, data=dataclasses.replace(own.config.data, reference_long_side=longest))
    _, [[wide, small]] = own.encode(["one"], [[Image.new("RGB", (160, 80), RED), Image.new("RGB", (16, 32), RED)]])
    assert wide.shape[:2] == (round(longest / 2 / 16) * 2, longest // 8)
    assert small.shape[:2] == (4, 2), "nothing is enlarged"


def test_references_keep_their_order_in_training_batches(tmp_path):
    """Two unlike references through records: four image tokens and one row of latents each, the first one's in front."""
    examples = some_examples(4)
    examples[1] = Example("a and b", [Image.new("RGB", (32, 32), (grey,) * 3) for grey in (40, 200)], examples[1].target)
    extract(examples, FakeEncoders(), tmp_path, target_size=(64, 64), reference_long_side=32)
    batch = next(make_dataset(tmp_path, batch=4, seed=0))
    place = batch.index.tolist().index(1)
    of_mllm = batch.hidden_states.image[place, 0, :, 0].astype(np.float32)[batch.hidden_states.image_mask[place]]
    np.testing.assert_array_equal(of_mllm, [40] * 4 + [200] * 4)
    order = batch.hidden_states.image_positions[place][:8]
    np.testing.assert_array_equal(order, np.arange(8))
    tokens, positions = (
        x[place][batch.references.mask[place]] for x in (batch.references.tokens, batch.references.positions)
    )
    np.testing.assert_allclose(127.5 * (tokens.mean(axis=1) + 1), [40] * 4 + [200] * 4, rtol=1e-5)
    assert positions.tolist() == [[r, c] for start in (4, 6) for r in (start, start + 1) for c in (start, start + 1)]


# --- cached references -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached():
    dit = dataclasses.replace(CONFIG.model.dit, reference_attention="cached", num_single_blocks=1)
    return randomised(dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dit=dit)))


def test_cached_references_are_modulated_at_time_zero(cached):
    """Their values in the first double block in float64: embeddings of 0 and guidance, shift, scale, norm, linear."""
    dit, references = cached.dit, jax.tree.map(jnp.asarray, tiny_batch(rows=2).references)
    shown = cached.prepare_references(references, 2.0)

    def linear(layer, x, block=None):
        kernel, bias = (np.asarray(leaf[...] if block is None else leaf[...][block], np.float64)
                        for leaf in (layer.kernel, layer.bias))  # fmt: skip
        return x @ kernel + bias

    def silu(x):
        return x / (1 + np.exp(-x))

    def embedded(layer, x):
        return linear(layer.out_layer, silu(linear(layer.in_layer, x)))

    def waves(value):
        angles = 1000 * value * 10_000.0 ** (-np.arange(128) / 128)
        return np.concatenate([np.cos(angles), np.sin(angles)])

    pooled = embedded(dit.vector_in, np.zeros(dit.config.pooled_width))
    tokens = linear(dit.img_in, np.asarray(references.tokens, np.float64))
    normal = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    double, found = dit.double_blocks, np.asarray(shown.double[1][0])
    for t, right in ((0.0, True), (0.5, False), (1.0, False)):
        vec = embedded(dit.time_in, waves(t)) + embedded(dit.guidance_in, waves(2.0)) + pooled
        shift, scale = np.split(linear(double.img_mod.lin, silu(vec), 0), 6)[:2]
        values = linear(double.img_attn.qkv, (1 + scale) * normal + shift, 0)[..., 2 * dit.config.width :]
        error = relative_error(found.reshape(values.shape), values)
        assert error < 1e-4 if right else error > 1e-2, t


def test_a_call_with_cached_references_is_modulated_as_they_are(cached):
    """The transformer's own call: the same as by references that were prepared once."""
    rng = np.random.default_rng(3)
    x, tokens, context = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 4, 64), (1, 4, 64), (1, 3, 24))
    )
    t, guidance = jnp.full(1, 0.7), jnp.full(1, 2.0)
    from_call = cached.dit(x, context, t, guidance, target_grid=GRID, references=[(tokens, GRID)])
    positions = jnp.asarray(reference_positions(GRID, [GRID]))[None]
    shown = cached.prepare_references(References(tokens, jnp.ones((1, 4), bool), positions), 2.0)
    by_parts = cached.velocity(x, GRID, t, Context(context, jnp.ones((1, 3), bool)), shown, 2.0)
    assert relative_error(from_call, by_parts) < 1e-5
