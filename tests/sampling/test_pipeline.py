"""The pipeline around the staged sampler: batches, streams, meshes, references, and what it refuses."""

import dataclasses
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from parity import relative_error
from PIL import Image
from small_sampling import CACHED, CONFIG, NO_ENCODERS, random_system, some_latents
from tiny import row, tiny_batch

from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.images import load_image
from squeeze_jax.diffusion.stages import carry_tau, plan_stages, time_steps
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.grids import Encoded, draw_examples
from squeeze_jax.models import dit
from squeeze_jax.sampling.batching import split_evenly
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import STAGE_NAMES, STAGES
from squeeze_jax.sharding import current_mesh, make_mesh, shardings
from squeeze_jax.training.state import flatten_params, replace_params

GRID, TOKENS = (2, 2), 4


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


def test_the_package_offers_the_pipeline_without_importing_it():
    import squeeze_jax

    assert squeeze_jax.Pipeline is Pipeline and squeeze_jax.Settings is Settings
    code = "import sys, squeeze_jax; print(squeeze_jax.__version__, 'jax' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [squeeze_jax.__version__, "False"]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        squeeze_jax.nothing  # noqa: B018


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
