"""What the codecs of hidden states cost and what they lose: the tables of docs/data.md.

    python benchmarks/codecs.py [--pairs 128] [--examples 8]

Full size is synthetic (29 x 320 x 3584, a few channels far larger than the others, as multimodal LLMs have them); demo
size are the hidden states of held-out critters, with the shipped weights.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx

from squeeze_jax.batch import HiddenStates
from squeeze_jax.data.codec import CODECS, dequantise, outliers, quantise
from squeeze_jax.data.record_format import FeatureRecord
from squeeze_jax.data.records import FeatureSource, write_metadata, write_shard
from squeeze_jax.evaluation.grids import sample_examples
from squeeze_jax.miniature.scores import paired_difference, render, score_settings
from squeeze_jax.miniature.source import CritterRows
from squeeze_jax.models.aggregator import Aggregator, AggregatorConfig
from squeeze_jax.sampling.pipeline import Pipeline, Settings

OUTLIERS = (3000, 800, 200, 100, 60, 40)
"""How many times larger than the rest, one channel each."""


def synthetic(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """bf16 [29, tokens, 3584] with outlier channels, and which channels these are."""
    rng = np.random.default_rng(seed)
    spread = np.exp(0.5 * rng.standard_normal(3584)).astype(np.float32)
    states = rng.standard_normal((29, tokens, 3584), np.float32) * spread
    large = rng.choice(3584, len(OUTLIERS), replace=False)
    states[..., large] *= np.array(OUTLIERS, np.float32)
    return states.astype(ml_dtypes.bfloat16), large


def record(text: np.ndarray, image: np.ndarray, side: int) -> FeatureRecord:
    """A record with one reference as large as its target."""
    latent = np.random.default_rng(0).standard_normal((side, side, 16), np.float32)
    positions = np.arange(text.shape[1] + image.shape[1], dtype=np.int32)
    count = image.shape[1]
    return FeatureRecord("a prompt", text, positions[count:], image, positions[:count], latent, (latent,))


def measure(records: list[FeatureRecord], codec: str, layers: tuple[int, ...] | None = None) -> tuple[float, float, float]:
    """Bytes on disk, and milliseconds of CPU time for writing and for reading and decoding, of an example."""
    kept = slice(None) if layers is None else list(layers)
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        start = time.process_time()
        write_shard(folder, 0, 1, (r._replace(text=r.text[kept], image=r.image[kept]) for r in records), codec)
        wrote = (time.process_time() - start) / len(records)
        write_metadata(folder, 1, {}, codec, layers)
        size = sum(file.stat().length for file in folder.iterdir() if file.name.endswith("00001")) / len(records)
        source = FeatureSource(folder)
        source[0]
        times = []
        for i in range(len(records)):
            start = time.process_time()
            one = source[i]
            np.copy(one.text), np.copy(one.image)  # as a batch is filled; bf16 parts are views
            times.append(time.process_time() - start)
    return size, 1e3 * wrote, 1e3 * statistics.median(times)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    difference = np.asarray(found, np.float32) - np.asarray(wanted, np.float32)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(wanted, np.float32)))


def plain_int8(states: np.ndarray) -> np.ndarray:
    """One scale a (layer, token) and no outliers apart."""
    return dequantise(quantise(states, 0))


def through(codec: str):
    return lambda states: CODECS[codec].decode(CODECS[codec].encode(states))


WAYS = {"bf16": through("bf16"), "int8, no outliers apart": plain_int8, "int8": through("int8")}


def sizes_and_speed(examples: list[FeatureRecord], subset: tuple[int, ...], name: str) -> None:
    layers = examples[0].text.shape[0]
    print(f"\n| {name} | MB an example | write, CPU ms | read and decode, CPU ms |\n|---|---|---|---|")
    for codec in CODECS:
        for label, chosen in ((f"all {layers}", None), (f"{len(subset)} of {layers}", subset)):
            size, wrote, read = measure(examples, codec, chosen)
            print(f"| {codec}, {label} layers | {size / 1e6:.3f} | {wrote:.1f} | {read:.2f} |", flush=True)


def device_decode() -> None:
    """The alternative: int8 and scales go to the device, which multiplies."""
    q, scale = jnp.zeros((29, 320, 3584), jnp.int8), jnp.ones((29, 320))
    multiply = jax.jit(lambda q, scale: (q.astype(jnp.float32) * scale[..., None]).astype(jnp.bfloat16))
    multiply(q, scale).block_until_ready()
    times = []
    for _ in range(5):
        start = time.process_time()
        multiply(q, scale).block_until_ready()
        times.append(time.process_time() - start)
    milliseconds = 1e3 * statistics.median(times)
    print(f"\ndecoding a full-size example in a compiled program on this CPU instead: {milliseconds:.0f} ms of CPU time")


def full_size_error() -> None:
    states, large = synthetic(32)
    rest = np.setdiff1d(np.arange(3584), large)
    config = AggregatorConfig(mlp_width=1024, refiner_blocks=0)
    graph, leaves = nnx.split(Aggregator(config, rngs=nnx.Rngs(0)))
    mask, positions = np.ones((1, 16), bool), np.arange(32, dtype=np.int32)[None]
    run = jax.jit(lambda leaves, x: nnx.merge(graph, leaves)(x).tokens)

    def context(states: np.ndarray) -> np.ndarray:
        halves = [states[None, :, part] for part in (slice(16, None), slice(0, 16))]
        x = HiddenStates(halves[0], mask, positions[:, 16:], halves[1], mask, positions[:, :16])
        return np.asarray(run(leaves, x))

    exact = context(states)
    print(f"\nfull size, synthetic: {len(OUTLIERS)} channels {OUTLIERS[-1]} to {OUTLIERS[0]} times the others; random DLA")
    print("\n| | hidden states | their other channels | DLA's output |\n|---|---|---|---|")
    for name, way in WAYS.items():
        back = way(states)
        errors = relative(back, states), relative(back[..., rest], states[..., rest]), relative(context(back), exact)
        print(f"| {name} | " + " | ".join(f"{100 * error:.2g} %" for error in errors) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--examples", type=int, default=8)
    given = parser.parse_args()

    states, _ = synthetic(320)
    sizes_and_speed([record(states[:, :64], states[:, 64:], 64)] * given.examples, tuple(range(10, 20)), "full size")
    device_decode()
    full_size_error()

    pipeline = Pipeline.load()
    critters = pipeline.config.data.critters
    assert critters is not None
    rows = CritterRows(critters, "held_out")
    examples, pairs = [rows[i] for i in range(given.pairs)], [rows.pair(i) for i in range(given.pairs)]
    prompts, pictures = [e.prompt for e in examples], [e.references for e in examples]
    encoded = pipeline.encoders.hidden_states(prompts, pictures)
    records = [record(e.text, e.image, 16) for e in encoded]
    sizes_and_speed(records, (4,), "demo size")

    read = pipeline.encoders.reader.read

    def converted(way):
        def hidden(prompts, images):
            x = read(prompts, images)
            text, image = (
                np.stack([np.asarray(way(np.asarray(row)), np.float32) for row in part]) for part in (x.text, x.image)
            )
            return x._replace(text=text, image=image)

        return hidden

    exact = read(prompts[:64], pictures[:64])
    system = nnx.merge(pipeline.graphdef, *pipeline.params)
    context = jax.jit(lambda x: system.aggregate(x).tokens)
    valid = np.asarray(system.aggregate(exact).mask)
    wanted = np.asarray(context(exact))[valid]
    print("\n| demo | hidden states | DLA's output |\n|---|---|---|")
    for name in CODECS:
        found = converted(WAYS[name])(prompts[:64], pictures[:64])
        both = [np.concatenate([np.ravel(x.text), np.ravel(x.image)]) for x in (found, exact)]
        errors = relative(both[0], both[1]), relative(np.asarray(context(found))[valid], wanted)
        print(f"| {name} | " + " | ".join(f"{100 * error:.2g} %" for error in errors) + " |", flush=True)
    print(f"(width {encoded[0].text.shape[-1]}: {outliers(encoded[0].text.shape[-1])} outliers apart)\n")

    images = {}
    for name in ("as read", *CODECS):
        pipeline.encoders.reader.read = read if name == "as read" else converted(WAYS[name])
        images[name] = sample_examples(pipeline, examples, Settings())

    def codec(pictures: np.ndarray) -> np.ndarray:
        latents = np.stack(pipeline.encoders.latents(list(pictures * 2 - 1)))
        return np.clip((pipeline.encoders.decode(latents) + 1) / 2, 0, 1)

    scores = score_settings(images, pairs, seed=0, codec=codec)
    print(render(scores).split("\n\n")[0])
    for task in scores["int8"].hits:
        difference = paired_difference(scores["int8"], scores["as read"], task)
        values = [100 * value for value in (difference.value, difference.low, difference.high)]
        print("{}: int8 minus as read {:+.1f} points ({:+.1f} to {:+.1f})".format(task, *values))


if __name__ == "__main__":
    main()
