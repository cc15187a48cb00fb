"""The staged sampler against closed forms, its masked twin, and single pictures; and the pipeline around it."""

import dataclasses
import subprocess
import sys
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from naive_sampler import sample_naively
from parity import relative_error
from PIL import Image
from tiny import row, tiny_batch, tiny_config

from squeeze_jax.batch import Context
from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.config import StageConfig, TrainingConfig
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.images import load_image
from squeeze_jax.diffusion.flow import no_shift, schedule_shift
from squeeze_jax.diffusion.latents import pack, reference_positions
from squeeze_jax.diffusion.stages import carry_tau, plan_stages, time_steps
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.grids import Encoded, draw_examples
from squeeze_jax.models import dit
from squeeze_jax.models.backbone import Modulation
from squeeze_jax.models.system import System
from squeeze_jax.sampling.batching import REFERENCE_BUCKET, pad_references, split_evenly
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.sampler import make_sampler
from squeeze_jax.sampling.schedule import MAX_STEPS, STAGE_NAMES, STAGES, make_schedule, noise_for
from squeeze_jax.sharding import current_mesh, make_mesh, shardings
from squeeze_jax.training.state import flatten_params, replace_params

GRID, TOKENS = (2, 2), 4


def random_system(config) -> System:
    """Every parameter random, as `tiny.randomised`, but without compiling an initialisation."""
    system, rng = nnx.eval_shape(lambda: build_system(config)), np.random.default_rng(0)
    flat = nnx.to_flat_state(nnx.state(system, nnx.Param))
    for path, leaf in flat:
        matrix = path[-1] == "kernel"
        around = 1.0 if path[-1] == "scale" and path[0] == "dit" else 0.0
        noise = rng.standard_normal(leaf.shape) * (leaf.shape[-2] ** -0.5 if matrix else 0.2)
        leaf.set_value(jnp.asarray(around + noise, leaf.dtype))
    nnx.update(system, nnx.from_flat_state(flat))
    return system


# --- closed forms: systems whose velocity is known -------------------------------------------------------------------


class Field(System):
    """A velocity that is a formula of x, t and of which conditions have tokens."""

    def __init__(self, formula) -> None:
        self.formula = formula

    def aggregate(self, states):
        return Context(jnp.ones((states.text.shape[0], 1, 1)), jnp.ones((states.text.shape[0], 1), bool))

    def make_modulation(self, times, guidance=1.0):
        return Modulation((), (), ())

    def prepare_references(self, references, guidance=1.0):
        return references

    def velocity(self, target, target_grid, t, context, references, guidance=1.0, modulation=None):
        return self.formula(target, t[:, None, None], context.tokens.shape[1] > 0, references is not None)


BATCH = row(tiny_batch(mixed=False), 0)
NOISE = noise_for([0, 1], TOKENS, 3)


def sample(formula, schedule, scale=1.0, references=True, guided=(False, False, False)):
    graph, state = nnx.split(Field(formula))
    program = make_sampler(graph, target_grid=GRID, guided=guided, guidance=1.0)
    shown = BATCH.references if references else None
    return program((state,), NOISE, BATCH.hidden_states, shown, schedule, np.broadcast_to(np.float32(scale), 3))


@pytest.mark.parametrize("steps", [1, 7, MAX_STEPS])
def test_euler_on_a_linear_field(steps):
    """v = 2x: every step multiplies x by 1 + 2·(t_next − t)."""
    schedule = make_schedule(steps, TOKENS, 0.9, 0.5, references=True)
    factor = np.prod(1 + 2 * np.diff(time_steps(steps, TOKENS).astype(np.float64)))
    np.testing.assert_allclose(sample(lambda x, t, *_: 2 * x, schedule), NOISE * factor, rtol=1e-4, atol=1e-6)


def test_euler_on_a_field_of_time():
    """v = t: the left Riemann sum of the schedule, so a step uses the time at its start."""
    times = time_steps(9, TOKENS).astype(np.float64)
    schedule = make_schedule(9, TOKENS, 0.9, 0.5, references=True)
    out = sample(lambda x, t, *_: jnp.broadcast_to(t, x.shape), schedule)
    np.testing.assert_allclose(out, NOISE + np.sum(np.diff(times) * times[:-1]), atol=1e-5)


def test_a_straight_flow_lands_on_the_picture_whatever_the_steps():
    """v = (x − x_0) / t is what a perfect model of one picture says."""
    for steps in (1, 3, 25):
        schedule = make_schedule(steps, TOKENS, 0.9, 0.5, references=True)
        np.testing.assert_allclose(sample(lambda x, t, *_: (x - 0.7) / t, schedule), np.full(NOISE.shape, 0.7), atol=1e-5)


@pytest.mark.parametrize(
    ("tau1", "tau2", "references"),
    [
        (0.9, 0.4, True), (0.7, 0.7, True), (1.0, 0.0, True), (0.0, 0.0, True), (1.0, 1.0, True), (0.9, 0.4, False),
        (1.1, 0.0, True), (1.1, 0.5, True), (1.1, 1.1, True), (1.1, 0.0, False),
    ],
)
@pytest.mark.parametrize("guided", [(False, False, False), (True, True, True), (True, False, True)])
def test_each_step_sees_the_conditions_of_its_stage(tau1, tau2, references, guided):
    """A velocity of 1 for the MLLM, 10 for the references and 100 for neither adds up to the stages' lengths."""
    speed = lambda mllm, vae: 1.0 * mllm + 10.0 * vae + 100.0 * (not mllm and not vae)  # noqa: E731
    schedule = make_schedule(8, TOKENS, tau1, tau2, references=references)
    out = sample(lambda x, t, mllm, vae: jnp.full_like(x, speed(mllm, vae)), schedule, 2.5, references, guided)
    expected, times = np.asarray(NOISE, np.float64), time_steps(8, TOKENS)
    for t, t_next in pairwise(times):
        kept = (True, False) if not references or t >= np.float32(tau1) else (bool(t >= np.float32(tau2)), True)
        v = 100.0 + 2.5 * (speed(*kept) - 100.0) if guided[STAGES.index(kept)] else speed(*kept)
        expected = expected + (np.float64(t_next) - np.float64(t)) * v
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


# --- the real system, small ------------------------------------------------------------------------------------------


CONFIG = tiny_config()
CACHED = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, dit=dataclasses.replace(CONFIG.model.dit, reference_attention="cached")),
)
GUIDED = (True, True, True)


def scales(scale):
    return np.broadcast_to(np.float32(scale), 3)


@pytest.fixture(scope="module")
def system():
    return random_system(CONFIG)


@pytest.fixture(scope="module", params=["joint", "cached"])
def programs(system, request):
    """Ours, and the naive one: each compiled once for the whole module."""
    if request.param == "cached":
        system = random_system(CACHED)
    graph, state = nnx.split(system)
    batch = tiny_batch(rows=2)
    # The second sample's references are all padding in `tiny_batch` if chance has it so: give both some.
    batch.references.mask[:, :2] = True
    batch.references.tokens[:, :2] = np.random.default_rng(9).standard_normal((2, 2, 64))
    noise = noise_for([0, 1], TOKENS, 64)
    sampler = make_sampler(graph, target_grid=GRID, guided=GUIDED, guidance=1.0)

    def ours(schedule, scale=2.5, batch=batch, noise=noise):
        return sampler((state,), noise, batch.hidden_states, batch.references, schedule, scales(scale))

    @jax.jit
    def naive(state, schedule, scale):
        states, references = jax.tree.map(jnp.asarray, (batch.hidden_states, batch.references))
        return sample_naively(nnx.merge(graph, state), noise, GRID, states, references, schedule, scale)

    return batch, noise, (ours, sampler, state), lambda schedule, scale: naive(state, schedule, scales(scale))


@pytest.mark.parametrize(
    ("tau1", "tau2"),
    [(0.9, 0.4), (0.6, 0.6), (1.0, 0.3), (0.0, 0.0), (1.0, 1.0), (1.1, 0.0), (1.1, 1.1)],
    ids=[
        "three stages", "never both", "both early", "MLLM throughout", "VAE but for the first step",
        "both throughout", "VAE throughout",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_conditions_left_out_equal_conditions_masked(programs, tau1, tau2, scale):
    _, noise, (left_out, *_), naive = programs
    schedule = make_schedule(6, TOKENS, tau1, tau2, references=True)
    short = left_out(schedule, scale)
    assert relative_error(short, naive(schedule, scale)) < 1e-5
    assert relative_error(short, noise) > 0.05


def test_tau_steps_and_guidance_matter_and_compile_nothing(programs):
    _, _, (left_out, sampler, _), _ = programs
    settings = [(6, 0.9, 0.4, 2.5), (6, 0.6, 0.4, 2.5), (6, 0.9, 0.6, 2.5), (9, 0.9, 0.4, 2.5), (6, 0.9, 0.4, 4.0)]
    found = [left_out(make_schedule(n, TOKENS, a, b, references=True), scale) for n, a, b, scale in settings]
    assert sampler.denoise._cache_size() == 1 and sampler.prepare._cache_size() == 1
    for i in range(1, len(found)):
        assert relative_error(found[i], found[0]) > 1e-3, settings[i]


def test_samples_of_a_batch_are_independent(programs):
    batch, noise, (left_out, *_), _ = programs
    schedule = make_schedule(6, TOKENS, 0.9, 0.4, references=True)
    both = left_out(schedule)
    swap = jnp.array([1, 0])
    swapped = left_out(schedule, batch=jax.tree.map(lambda x: x[swap], batch), noise=noise[swap])
    np.testing.assert_allclose(swapped[swap], both, rtol=1e-5, atol=1e-6)
    other = batch._replace(
        hidden_states=batch.hidden_states._replace(text=batch.hidden_states.text * np.float32([1, 2])[:, None, None, None])
    )
    changed = left_out(schedule, batch=other)
    np.testing.assert_allclose(changed[0], both[0], rtol=1e-5, atol=1e-6)
    assert relative_error(changed[1], both[1]) > 1e-3


# --- the pipeline ----------------------------------------------------------------------------------------------------


NO_ENCODERS = object.__new__(FeatureExtractor)  # `sample` starts behind them


def some_latents(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((height, width, 16)).astype(np.float32) for height, width in sizes]


@pytest.fixture(scope="module")
def pipeline(system):
    return Pipeline.of(system, CONFIG, NO_ENCODERS)


@pytest.fixture(scope="module")
def pipelines(pipeline):
    return {"joint": pipeline, "cached": Pipeline.of(random_system(CACHED), CACHED, NO_ENCODERS)}


def test_image_i_equals_what_its_seed_alone_gives(pipeline):
    states, latents = row(tiny_batch().hidden_states, 0), [some_latents((4, 6), (2, 2))]
    settings = Settings(cfg_scale=1.0)
    three = pipeline.sample(states, latents, [5, 6, 7], settings)
    for i in range(3):
        alone = pipeline.sample(states, latents, [5 + i], settings)
        assert relative_error(three[i : i + 1], alone) < 1e-5
    assert relative_error(three[0], three[1]) > 0.1


def test_steps_thresholds_and_guidance_are_arguments_of_one_program(pipeline):
    """So neither a compilation nor the peak of memory depends on them."""
    states, latents = row(tiny_batch().hidden_states, 0), [some_latents((4, 6), (2, 2))]
    fresh = dataclasses.replace(pipeline, _programs={})
    for steps, tau1, tau2, scale in ((2, 0.9, 0.4, 2.5), (9, 0.8, 0.8, 3.0), (4, 1.0, 0.0, 1.5)):
        fresh.sample(states, latents, [5], Settings(steps=steps, tau1=tau1, tau2=tau2, cfg_scale=scale))
    (program,) = fresh._programs.values()
    assert program.prepare._cache_size() == program.denoise._cache_size() == 1


def test_blocks_apart_draw_the_same(pipeline):
    states, latents = row(tiny_batch().hidden_states, 0), [some_latents((4, 6), (2, 2))]
    settings = Settings(steps=3, tau1=0.9, tau2=0.4)
    own = dataclasses.replace(pipeline, params=jax.tree.map(jnp.copy, pipeline.params), _programs={})
    apart = own.unrolled()
    drawn = apart.sample(states, latents, [5], settings)
    assert relative_error(drawn, pipeline.sample(states, latents, [5], settings)) < 1e-5
    with pytest.raises(InputError, match="unrolled already"):
        apart.unrolled().quantised()
    with pytest.raises(RuntimeError, match="deleted"):
        own.sample(states, latents, [5], settings)


def test_blocks_in_eight_bits_draw_almost_the_same(pipeline):
    pytest.importorskip("qwix", reason="the `quantize` extra is not installed")
    states, latents = row(tiny_batch().hidden_states, 0), [some_latents((4, 6), (2, 2))]
    settings, small = Settings(steps=3, tau1=0.9, tau2=0.4), pipeline.quantised()
    again = jax.tree.leaves(small.quantised().params)
    assert all(np.array_equal(a, b) for a, b in zip(again, jax.tree.leaves(small.params), strict=True)), "once is enough"
    flat = flatten_params(small.params[0])
    kernels = [leaf for name, leaf in flat.items() if "blocks" in name and name.endswith("kernel")]
    assert any(leaf.dtype == jnp.int8 for leaf in kernels)
    error = relative_error(small.sample(states, latents, [5], settings), pipeline.sample(states, latents, [5], settings))
    assert 1e-5 < error < 0.05


def test_a_first_block_cache_begins_anew_in_each_stage(pipeline):
    """Never left out, it draws what plain steps draw; always left out, only a stage's first step runs all blocks."""
    states, latents = row(tiny_batch().hidden_states, 0), [some_latents((4, 6), (2, 2))]
    settings = Settings(steps=6, tau1=0.9, tau2=0.4)
    plain = pipeline.sample(states, latents, [5], settings)
    never, always = (dataclasses.replace(settings, first_block_threshold=value) for value in (1e-9, 1e9))
    assert relative_error(pipeline.sample(states, latents, [5], never), plain) < 1e-5
    assert relative_error(pipeline.sample(states, latents, [5], always), plain) > 1e-3
    run = pipeline.run(states, latents, [5], always)
    known = []
    for i in range(6):
        state = run.sampler.denoise(
            pipeline.params, run.state, run.prepared, run.schedule, run.scales, np.array([i, i + 1], np.int32)
        )
        known.append([not (a.rest == b.rest).all() for a, b in zip(state.cache, run.state.cache)])
        run = run._replace(state=state)
    first = [int(i in {0, *(int(border) for border in run.schedule.borders[:-1])}) for i in range(6)]
    assert [own for own, _ in known] == first, "the conditional branch sees other tokens"
    assert [bare for _, bare in known] == [1, 0, 0, 0, 0, 0]


def test_streaming_is_sampling(pipeline, monkeypatch):
    """Step by step, or three at a time: the same bits, stage names in order, the last state the finished picture."""
    states, latents = row(tiny_batch().hidden_states, 0), [some_latents((4, 6), (2, 2))]
    monkeypatch.setattr(Pipeline, "encode", lambda self, prompts, references: (states, latents))
    settings = Settings(steps=6, tau1=0.9, tau2=0.4, cfg_scale=1.0, seed=5, num_images=2)
    whole = pipeline.sample(states, latents, [5, 6], settings)
    each = list(pipeline.stream("a prompt", settings=settings))
    assert [(state.step, state.steps) for state in each] == [(i, 6) for i in range(1, 7)]
    stages = plan_stages(time_steps(6, TOKENS), 0.9, 0.4)
    expected = [STAGE_NAMES[STAGES.index((s.mllm, s.vae))] for s in stages for _ in range(*s.steps)]
    assert [state.stage for state in each] == expected
    np.testing.assert_array_equal(each[-1].tokens, whole)
    again = dataclasses.replace(settings, cache_interval=2, solver="multistep")  # what steps remember is handed on
    whole, *_, last = pipeline.sample(states, latents, [5, 6], again), *pipeline.stream("a prompt", settings=again)
    np.testing.assert_array_equal(last.tokens, whole)
    assert relative_error(whole, each[-1].tokens) > 1e-3
    some = list(pipeline.stream("a prompt", settings=settings, every=4))
    assert [state.step for state in some] == [4, 6]
    np.testing.assert_array_equal(some[0].tokens, each[3].tokens)
    kept = jax.device_put(pipeline.params, jax.devices()[0])  # as weights that were read
    for each in (settings, again, dataclasses.replace(settings, first_block_threshold=0.1)):
        fresh = dataclasses.replace(pipeline, params=kept, _programs={})
        assert len(list(fresh.stream("a prompt", settings=each))) == 6
        (program,) = fresh._programs.values()
        assert program.denoise._cache_size() == 1


def test_several_prompts_at_once_are_each_alone(pipeline, monkeypatch):
    """With references of other sizes, or with none, each prompt's images are what it gives by itself."""
    batch = tiny_batch(mixed=False)
    rows = {"one": (0, some_latents((4, 6), (2, 2))), "two": (1, some_latents((8, 8), seed=1)), "three": (1, [])}

    calls = []

    def encode(self, prompts, references):
        calls.append(prompts)
        picked = jnp.array([rows[prompt][0] for prompt in prompts])
        return jax.tree.map(lambda x: x[picked], batch.hidden_states), [rows[prompt][1] for prompt in prompts]

    monkeypatch.setattr(Pipeline, "encode", encode)
    monkeypatch.setattr(Pipeline, "decode_later", lambda self, tokens, settings: lambda: np.asarray(tokens)[..., None])
    settings = Settings(cfg_scale=1.0, num_images=2)
    shown = {prompt: [Image.new("RGB", (8, 8))] * len(latents) for prompt, (_, latents) in rows.items()}
    together = pipeline(list(rows), list(shown.values()), settings)
    for at_once in (3, 1):  # in batches of a prompt's two images, and of one
        calls.clear()
        assert relative_error(pipeline(list(rows), list(shown.values()), settings, at_once=at_once), together) < 1e-5
        assert calls == [["one"], ["two"], ["three"]], "whatever number of images"
    with pytest.raises(InputError, match="at_once 0"):
        pipeline("one", [], settings, at_once=0)
    with pytest.raises(InputError, match="0 prompts"):
        pipeline([], [], settings)
    for i, prompt in enumerate(rows):
        alone = pipeline(prompt, shown[prompt], settings)
        assert relative_error(together[2 * i : 2 * i + 2], alone) < 1e-5
        assert relative_error(alone[0], alone[1]) > 0.1
    with pytest.raises(InputError, match="3 prompts and 1 lists"):
        pipeline(list(rows), [[]], settings)


def test_prompts_with_and_without_references_are_not_drawn_as_one_batch(pipeline):
    """Their stages differ. The sample grids of training sort them, as a call does."""
    states, latents = tiny_batch(rows=2, mixed=False).hidden_states, [some_latents((4, 6)), []]
    with pytest.raises(InputError, match="some prompts have references and some have none"):
        pipeline.sample(states, latents, [5, 6])
    with pytest.raises(InputError, match="3 seeds for 2 prompts"):
        pipeline.sample(states, [[], []], [5, 6, 7])
    encoded = [Encoded([i], row(states, i), [latents[i]]) for i in (0, 1)]
    together = draw_examples(painted(pipeline), encoded[::-1], Settings())
    for i in (0, 1):
        alone = draw_examples(painted(pipeline), [encoded[i]], Settings())
        np.testing.assert_array_equal(together[i], alone[0])


def painted(pipeline):
    """The pipeline with an autoencoder whose pictures are the first three channels of latents."""
    encoders = object.__new__(FeatureExtractor)
    encoders.decode_later = lambda latents: lambda: np.asarray(latents)[..., :3]
    return dataclasses.replace(pipeline, encoders=encoders)


def test_references_are_laid_upright_and_made_rgb(pipeline, tmp_path):
    """As the commands read them: whatever Pillow opens."""
    noise, exif = np.random.default_rng(0).integers(0, 255, (32, 16, 4), np.uint8), Image.Exif()
    Image.fromarray(noise).save(tmp_path / "clear.png")
    Image.fromarray(noise[..., 0]).save(tmp_path / "grey.png")
    exif[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(tmp_path / "phone.png", exif=exif)
    seen = []

    class Encoders(FeatureExtractor):
        def __init__(self):
            pass

        def latents(self, images, canvas=None):
            return [image[::8, ::8] for image in images]

        def read(self, prompts, images):
            seen.extend(images)
            return row(tiny_batch().hidden_states, 0)

    paths = [tmp_path / name for name in ("clear.png", "grey.png", "phone.png")]
    asked = dataclasses.replace(pipeline, encoders=Encoders())
    _, [latents] = asked.encode(["a"], [[Image.open(path) for path in paths]])
    _, [wanted] = asked.encode(["a"], [[load_image(path) for path in paths]])
    assert [latent.shape for latent in latents] == [(4, 2, 3), (4, 2, 3), (2, 4, 3)]
    for one, other in zip(latents, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [image.mode for row in seen for image in row] == ["RGB"] * 6


def test_a_batch_is_waited_for_when_the_next_is_under_way(pipeline, monkeypatch):
    seen = []

    def decode_later(self, tokens, settings):
        seen.append("begun")
        return lambda: seen.append("waited for") or np.asarray(tokens)

    monkeypatch.setattr(Pipeline, "decode_later", decode_later)
    states, latents = row(tiny_batch().hidden_states, 0), [some_latents((4, 6), (2, 2))]
    ready = pipeline.ready(states, latents, Settings(cfg_scale=1.0))
    drawn = list(pipeline.draw([(ready, [seed]) for seed in (5, 6, 7)]))
    assert seen == ["begun", "begun", "waited for", "begun", "waited for", "waited for"]
    assert relative_error(drawn[1], pipeline.sample(states, latents, [6], Settings(cfg_scale=1.0))) < 1e-5
    assert split_evenly([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3], [4, 4]]
    assert [len(piece) for piece in split_evenly(range(17), 16)] == [9, 9]
    assert [len(piece) for piece in split_evenly(range(100), 64, 8)] == [56, 56]
    assert [len(piece) for piece in split_evenly(range(3), 64, 8)] == [3]
    assert split_evenly([], 2) == [] and split_evenly([7], 2) == [[7]]


def test_thresholds_move_with_the_size_where_they_are_told_to(system):
    """The miniature's figures (64 tokens) from the paper's (1,024), and nothing moves by itself."""
    assert carry_tau(0.95, 1024, 64) == pytest.approx(0.826, abs=5e-4)
    assert carry_tau(0.85, 1024, 64) == pytest.approx(0.586, abs=5e-4)
    assert carry_tau(carry_tau(0.7, 1024, 64), 64, 1024) == pytest.approx(0.7)
    assert [carry_tau(end, 1024, 64) for end in (0.0, 1.0, 1.1)] == [0.0, 1.0, 1.1]
    own = dataclasses.replace(CONFIG.sampling, tau1=0.95, tau2=0.85)
    moving = dataclasses.replace(own, tau_tokens=1024)
    for sampling, expected in ((own, (0.95, 0.85)), (moving, (carry_tau(0.95, 1024, 4), carry_tau(0.85, 1024, 4)))):
        found = Pipeline.of(system, dataclasses.replace(CONFIG, sampling=sampling), NO_ENCODERS)
        assert (found.resolved(Settings()).tau1, found.resolved(Settings()).tau2) == expected
        assert found.resolved(Settings(tau1=0.9)).tau1 == 0.9
    both = dataclasses.replace(moving, tau1=1.1, tau2=0.0)
    found = Pipeline.of(system, dataclasses.replace(CONFIG, sampling=both), NO_ENCODERS).resolved(Settings())
    assert (found.tau1, found.tau2) == (1.1, 0.0)


def copies(leaves):
    """Weights whole on eight devices."""
    return jax.device_put(leaves, NamedSharding(make_mesh(data=8, fsdp=1), PartitionSpec()))


def slices(axes, leaves):
    """Weights cut over fsdp and tensor, as training leaves them."""
    mesh, flat = make_mesh(*axes), [(state, flatten_params(state)) for state in leaves]
    return tuple(replace_params(state, jax.device_put(named, shardings(named, mesh))) for state, named in flat)


LAID = {"copies": copies} | {
    str(axes): partial(slices, axes)
    for axes in [(2, 2, 2), (8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 2), (1, 2, 4), (1, 1, 8)]
}
FAST = [("copies", "joint"), ("(2, 2, 2)", "joint"), ("(2, 2, 2)", "cached")]
EVERY_WAY = [
    pytest.param(laid, kind, marks=() if (laid, kind) in FAST else pytest.mark.slow)
    for kind in ("joint", "cached")
    for laid in LAID
]


@pytest.mark.parametrize(("laid", "kind"), EVERY_WAY)
def test_weights_on_a_mesh_draw_the_same(pipelines, laid, kind, monkeypatch):
    """Two guided images (three, where each device has all weights) of a prompt. As in training: the weights lie on eight
    devices, what the encoders made on one."""
    constrain, seen = dit.constrain, []
    monkeypatch.setattr(dit, "constrain", lambda x, kind: (seen.append(current_mesh()), constrain(x, kind))[1])
    pipeline, states, latents = pipelines[kind], row(tiny_batch().hidden_states, 0), [some_latents((4, 6), (2, 2))]
    settings, seeds = Settings(cfg_scale=2.5), range(3 if laid == "copies" else 2)
    spread = dataclasses.replace(pipeline, params=LAID[laid](pipeline.params), _programs={})
    drawn = spread.sample(jax.device_put(states, jax.devices()[0]), latents, seeds, settings)
    assert len(drawn.sharding.device_set) == 8
    mesh = jax.tree.leaves(spread.params)[0].sharding.mesh
    assert set(seen) == {mesh.abstract_mesh}  # kernels have to know it
    assert relative_error(drawn, pipeline.sample(states, latents, seeds, settings)) < 1e-5


def test_text_alone_equals_the_mllm_throughout(pipeline, programs):
    """Without references whatever τ is: the same as τ1 = τ2 = 0 with references that are never used."""
    batch, _, (left_out, *_), _ = programs
    mllm = left_out(make_schedule(6, TOKENS, 0.0, 0.0, references=True))
    text = pipeline.sample(batch.hidden_states, [[], []], [0, 1], Settings(cfg_scale=2.5))
    assert relative_error(text, mllm) < 1e-5


def test_a_checkpoint_of_stage_one_samples_without_references(system, pipeline, programs):
    """It has never seen reference tokens: the MLLM stays on throughout, whatever references are given."""
    stage = TrainingConfig(stages=(StageConfig(steps=1, references=False),))
    first = Pipeline.of(system, dataclasses.replace(CONFIG, training=stage), NO_ENCODERS)
    assert not first.uses_references and pipeline.uses_references
    first._programs.update(pipeline._programs)  # spares compiling them again
    states, references = programs[0].hidden_states, some_latents((4, 6))
    given, none = (first.sample(states, latents, [0, 1]) for latents in ([references, references], [[], []]))
    np.testing.assert_array_equal(given, none)


def test_the_package_offers_the_pipeline_without_importing_it():
    import squeeze_jax

    assert squeeze_jax.Pipeline is Pipeline and squeeze_jax.Settings is Settings
    code = "import sys, squeeze_jax; print(squeeze_jax.__version__, 'jax' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [squeeze_jax.__version__, "False"]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        squeeze_jax.nothing  # noqa: B018


def test_references_of_several_sizes_make_one_padded_row():
    one, two = some_latents((4, 6), (2, 2)), some_latents((8, 8), seed=1)
    references = pad_references([one, two, []], GRID)
    assert references.tokens.shape == (3, REFERENCE_BUCKET, 64)
    np.testing.assert_array_equal(references.mask.sum(axis=1), [6 + 1, 16, 0])
    np.testing.assert_array_equal(references.tokens[0, :7], np.concatenate([pack(latent) for latent in one]))
    np.testing.assert_array_equal(references.positions[0, :7], reference_positions(GRID, [(2, 3), (1, 1)]))
    np.testing.assert_array_equal(references.positions[1, :16], reference_positions(GRID, [(4, 4)]))
    assert pad_references([[], []], GRID) is None
    assert pad_references([some_latents((8, 10))], GRID).tokens.shape[1] == 2 * REFERENCE_BUCKET


def test_noise_comes_from_the_seed_alone():
    noise = noise_for([3, 4], TOKENS, 64)
    np.testing.assert_array_equal(noise_for([9, 4, 3], TOKENS, 64)[1:], noise[::-1])
    assert abs(float(noise_for(list(range(50)), 16, 64).std()) - 1) < 0.01


def test_the_schedule_is_padded_and_ends_where_its_stages_end():
    schedule = make_schedule(25, 1024, 0.95, 0.85, references=True)
    assert schedule.times.shape == (MAX_STEPS + 1,)
    np.testing.assert_array_equal(schedule.times[:26], time_steps(25, 1024))
    assert not schedule.times[25:].any()
    assert schedule.borders.tolist() == [stage.steps[1] for stage in plan_stages(time_steps(25, 1024), 0.95, 0.85)]
    assert make_schedule(25, 1024, 0.95, 0.85, references=False).borders.tolist() == [25, 25, 25]
    assert make_schedule(10, TOKENS, 0.5, 0.5, references=True, shift=no_shift).borders.tolist() == [6, 6, 10]
    assert schedule_shift(TOKENS) < schedule_shift(1024)


@pytest.mark.parametrize(
    ("steps", "tau1", "tau2", "message"),
    [
        (0, 0.9, 0.5, "steps is 0"), (MAX_STEPS + 1, 0.9, 0.5, "steps is 101"), (4, 0.5, 0.9, "tau2 0.9 is"),
        (4, 1.2, 0.5, "tau1 is 1.2"), (4, 0.5, -0.1, "tau2 is -0.1"), (4, float("nan"), 0.5, "tau1 is nan"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(steps, tau1, tau2, message):
    with pytest.raises(InputError, match=message):
        make_schedule(steps, TOKENS, tau1, tau2, references=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(height=250, width=130), "the nearest size is 256x128"),
        (Settings(height=0), "nearest size is 16x32"),
        (Settings(num_images=0), "num_images is 0"),
        (Settings(tau2=0.95), "tau2 0.95 is larger than tau1 0.9"),
        (Settings(tau1=float("nan")), "tau1 is nan; it must be from 0 to 1.1"),
        (Settings(first_block_threshold=0.1, cache_interval=2), "two caches"),
    ],
)
def test_impossible_pictures_are_refused(pipeline, settings, message):
    with pytest.raises(InputError, match=message):
        pipeline.resolved(settings)
