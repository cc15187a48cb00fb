"""Trains the miniature's autoencoder to redraw a world's pictures: reconstruction plus a small KL term, Muon and
AdamW on a cosine.

The result's latents have zero mean and unit variance over what it was trained on, as FLUX.1's do
over photographs. Every number here is our decision; README says what it reached.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from squeeze_jax.array_types import Array, Float, Key
from squeeze_jax.miniature.critters import Split
from squeeze_jax.miniature.world import World
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig

DEMO_AUTOENCODER = AutoencoderConfig(
    block_out_channels=(8, 24, 48),
    latent_channels=8,
    layers_per_block=1,
    norm_groups=2,
    scaling_factor=1.0,
    shift_factor=0.0,
)
"""FLUX.1's autoencoder with 4x downsampling instead of 8x, so that a picture of 64x64 pixels is 8x8
tokens.

Two groups of channels a norm: with a group for each of eight channels the last norm would take
away mean colours."""

EMOJI_AUTOENCODER = replace(DEMO_AUTOENCODER, block_out_channels=(12, 32, 64))
"""The same with more channels, since emoji have more of everything than critters."""


@dataclass(frozen=True)
class AutoencoderTraining:
    """How the demo's autoencoder is trained; the defaults made the shipped weights."""

    steps: int = 2500
    batch: int = 8
    learning_rate: float = 0.02
    """Muon's peak, for kernels, reached after `warmup` steps, then a cosine to zero."""
    vector_learning_rate: float = 4e-3
    """AdamW's peak, for scales and biases, on the same schedule."""
    warmup: int = 50
    average: float = 0.998
    """Decay of the average of weights that is returned."""
    kl_weight: float = 3e-4
    """Times the KL divergence to N(0, 1) in nats per latent value, beside L1 + MSE per pixel
    value in [-1, 1]. Large enough that decoding bears an error of a tenth of a latent's standard
    deviation, small enough to stay sharp."""
    seed: int = 0


def train_autoencoder(
    config: AutoencoderConfig,
    training: AutoencoderTraining,
    images: Iterator[np.ndarray],
    *,
    progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    checkpoint: Callable[[int, Autoencoder], None] = lambda step, autoencoder: None,
    checkpoint_every: int = 500,
) -> Autoencoder:
    """An autoencoder trained on `images` (uint8 [B, height, width, 3] batches), with measured shift
    and scale.

    `progress(step, metrics)` is called after every step, `checkpoint(step, autoencoder)` now and
    then with the module as it would be returned. The same seed and images give the same weights on
    one machine.
    """
    autoencoder = Autoencoder(
        replace(config, shift_factor=0.0, scaling_factor=1.0), rngs=nnx.Rngs(training.seed)
    )
    graph, parameters = nnx.split(autoencoder, nnx.Param)
    optimizer = make_optimizer(training)
    moments = optimizer.init(parameters)
    root = jax.random.key(training.seed)

    def loss(parameters: nnx.State, pictures: Float[Array, "B height width 3"], key: Key) -> tuple:
        return reconstruction_loss(nnx.merge(graph, parameters), pictures, key, training.kl_weight)

    @jax.jit
    def train_step(parameters, moments, average, pictures, step):
        key = jax.random.fold_in(root, step)
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(
            parameters, to_float(pictures), key
        )
        updates, moments = optimizer.update(gradients, moments, parameters)
        parameters = optax.apply_updates(parameters, updates)
        keep = jnp.minimum(training.average, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: a + (1.0 - keep) * (p - a), average, parameters)
        return parameters, moments, average, metrics

    average, pictures, recent = parameters, next(images), []
    for step in range(training.steps):
        parameters, moments, average, metrics = train_step(
            parameters, moments, average, pictures, jnp.int32(step)
        )
        # The next batch is drawn while this step runs; reading the metrics waits for it.
        recent = [*recent[-63:], pictures]
        pictures = next(images)
        progress(step + 1, {name: float(value) for name, value in metrics.items()})
        if (step + 1) % checkpoint_every == 0 and step + 1 < training.steps:
            checkpoint(step + 1, with_measured_scale(nnx.merge(graph, average), recent))
    measured = with_measured_scale(nnx.merge(graph, average), recent)
    checkpoint(training.steps, measured)
    return measured


def pictures_of(
    world: World, seed: int, batch: int, split: Split = "train"
) -> Iterator[np.ndarray]:
    """Endless batches of a world's pictures, uint8 [batch, 64, 64, 3]."""
    for start in count(0, batch):
        yield np.stack([world.picture(seed, index, split) for index in range(start, start + batch)])


def reconstruction_loss(
    autoencoder: Autoencoder, images: Float[Array, "B height width 3"], key: Key, kl_weight: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """L1 + MSE of a reconstruction from a posterior draw, plus the KL term; and the parts, to be
    logged."""
    mean, log_variance = autoencoder.posterior(images)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = autoencoder.decode(autoencoder.normalise(latents)) - images
    mae, mse = jnp.abs(error).mean(), jnp.square(error).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance).mean()
    total = mae + mse + kl_weight * kl
    return total, {"loss": total, "mae": mae, "psnr": psnr_of(mse), "kl": kl}


def make_optimizer(training: AutoencoderTraining) -> optax.GradientTransformation:
    """Muon for kernels (as [h·w·in, out] matrices), AdamW for vectors; clipping, warm-up and a
    cosine to zero.

    On two cores steps are scarce, and with Muon the same error takes about half as many as with
    AdamW.
    """
    warmup = min(training.warmup, max(training.steps // 10, 1))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, training.steps)

    def matrices(parameters: optax.Params) -> optax.Params:
        return jax.tree.map(
            lambda x: (
                MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1) if x.ndim > 1 else None
            ),
            parameters,
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            lambda step: schedule(step) * training.learning_rate,
            muon_weight_dimension_numbers=matrices,
            adam_learning_rate=lambda step: schedule(step) * training.vector_learning_rate,
            adam_b2=0.99,
        ),
    )


def with_measured_scale(autoencoder: Autoencoder, batches: list[np.ndarray]) -> Autoencoder:
    """The same weights with shift and scale such that the latents of `batches` have mean 0 and
    standard deviation 1."""
    posterior = nnx.jit(lambda module, images: module.posterior(images)[0])
    means = np.concatenate(
        [np.asarray(posterior(autoencoder, to_float(batch))) for batch in batches]
    )
    shift, scale = float(means.mean(dtype=np.float64)), float(1.0 / means.std(dtype=np.float64))
    return with_config(
        autoencoder, replace(autoencoder.config, shift_factor=shift, scaling_factor=scale)
    )


def with_config(autoencoder: Autoencoder, config: AutoencoderConfig) -> Autoencoder:
    """The same weights under another shift and scale."""
    other = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    nnx.update(other, nnx.state(autoencoder, nnx.Param))
    return other


def measure(
    autoencoder: Autoencoder, images: np.ndarray, *, noise: float = 0.1, seed: int = 0
) -> dict[str, float]:
    """Redrawing of uint8 pictures [B, height, width, 3]: PSNR in dB, the same with Gaussian
    noise of deviation `noise` on the latents, and the latents' own mean and deviation."""
    clean, noisy, latents = redraw(autoencoder, images, noise=noise, seed=seed)
    return {
        "psnr": psnr(images, clean),
        "psnr_noisy_latents": psnr(images, noisy),
        "latent_mean": float(latents.mean()),
        "latent_std": float(latents.std()),
    }


def redraw(
    autoencoder: Autoencoder,
    images: np.ndarray,
    *,
    noise: float = 0.1,
    seed: int = 0,
    batch: int = 32,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures through the autoencoder (uint8), the same from latents with noise, and the
    latents without."""

    @nnx.jit
    def run(
        module: Autoencoder, pictures: jax.Array, key: Key
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        latents = module.encode(to_float(pictures))
        shaken = latents + noise * jax.random.normal(key, latents.shape)
        return to_uint8(module.decode(latents)), to_uint8(module.decode(shaken)), latents

    parts = []
    for index, start in enumerate(range(0, len(images), batch)):
        key = jax.random.fold_in(jax.random.key(seed), index)
        parts.append(
            [
                np.asarray(x)
                for x in run(autoencoder, jnp.asarray(images[start : start + batch]), key)
            ]
        )
    clean, noisy, latents = (np.concatenate(x) for x in zip(*parts))
    return clean, noisy, latents


def preview(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """One uint8 picture for the eye: originals above, redrawn below, redrawn from noisy latents
    last."""
    clean, noisy, _ = redraw(autoencoder, images)
    return np.concatenate(
        [np.concatenate(list(row), axis=1) for row in (images, clean, noisy)], axis=0
    )


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB, averaged over pictures."""
    error = np.square(images.astype(np.float64) - others.astype(np.float64)).mean(axis=(1, 2, 3))
    return float((10.0 * np.log10(255.0**2 / np.maximum(error, 1e-3))).mean())


def psnr_of(mse: Float[Array, ""]) -> Float[Array, ""]:
    """dB of a mean squared error of pictures in [-1, 1] (peak 2)."""
    return 10.0 * jnp.log10(4.0 / mse)


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
    """uint8 to [-1, 1]."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] to uint8, clipped and rounded."""
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
