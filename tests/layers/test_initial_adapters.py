"""A fresh adapter, in closed form: `down` is normal with standard deviation gain · in^-1/2, `up` zero."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from squeeze_jax.layers.lora import LoRAConfig, add_lora
from squeeze_jax.models.dit import DiT, DiTConfig

# Six layers of every kind, wide enough that a deviation is known to 2 %.
CONFIG = DiTConfig(context_width=8, pooled_width=8, heads=2, head_width=32,
                   num_double_blocks=1, num_single_blocks=1,
                   rope_axes=(8, 12, 12))  # fmt: skip


@pytest.mark.parametrize(("alpha", "gain"), [(None, 1.0), (4.0, 1.0), (None, 3**-0.5)])
def test_down_varies_by_one_over_the_root_of_its_inputs_and_up_is_zero(alpha, gain):
    """Whatever alpha is, which scales the delta alone."""
    dit = nnx.eval_shape(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))
    paths = add_lora(dit, LoRAConfig(rank=64, alpha=alpha, init_gain=gain), rngs=nnx.Rngs(1))
    assert len(paths) == 6
    downs = []
    for path in paths:
        layer = dit
        for name in path.split("."):
            layer = getattr(layer, name)
        (part,) = layer.adapter.parts
        down, up = np.asarray(part.down[...], np.float64), np.asarray(part.up[...])
        assert not up.any() and part.down[...].dtype == jnp.float32
        assert down.std() == pytest.approx(gain * down.shape[-2] ** -0.5, rel=0.05), path
        assert abs(down.mean()) < 0.05 * down.std() and np.abs(down).max() < 6 * down.std()
        assert np.mean(np.abs(down)) == pytest.approx(down.std() * (2 / np.pi) ** 0.5, rel=0.03), "normal"
        downs.append(down.ravel()[:64])
    assert np.abs(np.corrcoef(downs) - np.eye(6)).max() < 0.6, "no two from one key"
