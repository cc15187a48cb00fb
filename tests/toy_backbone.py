"""The smallest backbone: what `models.backbone.Backbone` asks for, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.diffusion.latents import reference_positions
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.modulation import modulate, sinusoidal
from squeeze_jax.models.backbone import (
    Backbone,
    BlockInputs,
    CachedReferences,
    Modulation,
    join_masks,
)


def stack(trees):
    return jax.tree.map(lambda *each: jnp.stack(each), *trees)


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    in_channels: int = 64
    context_width: int = 24
    width: int = 16
    depth: int = 2
    guidance: bool = False
    reference_attention: str = "joint"
    reference_positions = staticmethod(reference_positions)
    schedule_shift = staticmethod(lambda target_tokens, steps: 1.0)


class ToyBlock(nnx.Module):
    """Attention of one head, modulated."""

    def __init__(self, width, rngs):
        self.mod, self.qkv = Linear(width, 2 * width, rngs=rngs), Linear(width, 3 * width, rngs=rngs)

    def modulation(self, temb):
        return tuple(jnp.split(self.mod(temb)[:, None], 2, axis=-1))

    def __call__(self, x, modulation, mask, cached):
        q, k, v = jnp.split(self.qkv(modulate(x, *modulation)), 3, axis=-1)
        keys, values = k, v
        if cached is not None:
            rows = len(x) // len(cached[0])
            keys, values = (jnp.concatenate([a, jnp.repeat(b, rows, 0)], 1) for a, b in zip((k, v), cached))
        scores = jnp.where(mask[:, None], jnp.einsum("btc,bsc->bts", q, keys) / 4.0, -1e30)
        return x + jnp.einsum("bts,bsc->btc", jax.nn.softmax(scores, axis=-1), values), (k, v)


class ToyBackbone(Backbone):
    def __init__(self, config=ToyConfig(), *, rngs):
        self.config = config
        self.txt_in = Linear(config.context_width, config.width, rngs=rngs)
        self.img_in, self.time_in = Linear(config.in_channels, config.width, rngs=rngs), Linear(256, 16, rngs=rngs)
        self.blocks = nnx.List([ToyBlock(config.width, rngs) for _ in range(config.depth)])
        self.out = Linear(config.width, config.in_channels, rngs=rngs)

    def embed_timestep(self, t, guidance=None):
        return self.time_in(sinusoidal(t))

    def make_modulation(self, temb):
        return Modulation(stack([block.modulation(temb) for block in self.blocks]), (), ())

    def cache_references(self, references, temb):
        x, cache = self.img_in(references.tokens), []
        for block in self.blocks:
            x, kv = block(x, block.modulation(temb), references.mask, None)
            cache.append(kv)
        return CachedReferences(stack(cache), (), references.mask)

    def embed_inputs(self, target, target_grid, temb, context, context_mask=None, references=None):
        cached = references if isinstance(references, CachedReferences) else None
        tokens, mask = target, jnp.ones(target.shape[:2], bool)
        if references is not None:
            mask = jnp.concatenate([mask, references.mask], axis=1)
            tokens = target if cached else jnp.concatenate([target, references.tokens], axis=1)
        mask = join_masks(context_mask, mask, (len(target), context.shape[1], mask.shape[1]))
        return (self.txt_in(context), self.img_in(tokens)), BlockInputs(temb, (), mask, cached)

    def apply_blocks(self, streams, inputs, start=0, stop=None):
        x, length = jnp.concatenate(streams, axis=1), streams[0].shape[1]
        for i, block in list(enumerate(self.blocks))[start:stop]:
            known, cache = isinstance(inputs.temb, Modulation), inputs.cached_kv
            modulation = [part[i] for part in inputs.temb.double] if known else block.modulation(inputs.temb)
            x, _ = block(x, modulation, inputs.mask, cache and [part[i] for part in cache.double])
        return x[:, :length], x[:, length:]

    def predict_velocity(self, hidden, inputs):
        return self.out(hidden)
