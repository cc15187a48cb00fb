"""The transformer against diffusers' FluxTransformer2DModel, and the properties that sampling relies on."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import randomise, relative_error

from squeeze_jax.diffusion.latents import grid_positions, reference_origins
from squeeze_jax.interop.flux import config_to_json, diffusers_entries
from squeeze_jax.interop.mapping import export_entries, load_entries
from squeeze_jax.models.dit import DiT, DiTConfig

CONFIG = DiTConfig(
    in_channels=64, context_width=40, pooled_width=24, heads=3, head_width=24, double_blocks=2, single_blocks=3,
    rope_axes=(4, 8, 12),
)  # fmt: skip


def random_dit(config: DiTConfig = CONFIG, seed: int = 0, **kwargs) -> DiT:
    """Ours with every leaf random, norms around 1."""
    dit = DiT(config, rngs=nnx.Rngs(seed), **kwargs)
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(dit, nnx.Param)):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        small = path[-1] == "bias" or path[-1] == "scale"
        leaf.set_value(jnp.asarray((path[-1] == "scale") + noise * (0.2 if small else leaf.shape[-2] ** -0.5)))
    return dit


def inputs(batch=2, grid=(4, 6), references=((2, 3), (4, 2)), context=5, seed=1, config=CONFIG):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "target": normal(batch, grid[0] * grid[1], config.in_channels),
        "context": normal(batch, context, config.context_width),
        "t": np.linspace(0.3, 0.9, batch).astype(np.float32),
        "guidance": np.linspace(1.0, 3.5, batch).astype(np.float32) if config.guidance else None,
        "pooled": normal(batch, config.pooled_width),
        "target_grid": grid,
        "references": [(normal(batch, h * w, config.in_channels), (h, w)) for h, w in references],
    }


def torch_twin(config: DiTConfig = CONFIG):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    diffusers = pytest.importorskip("diffusers")
    values = {k: v for k, v in config_to_json(config).items() if not k.startswith("_")}
    twin = diffusers.FluxTransformer2DModel(**values).eval()
    randomise(twin)
    return torch, twin


def run_twin(torch, twin, x):
    """The same call on diffusers' side: references behind the target, positions by hand."""
    tokens = np.concatenate([x["target"], *(r for r, _ in x["references"])], axis=1)
    origins = reference_origins(x["target_grid"], [g for _, g in x["references"]])
    rows = [grid_positions(*x["target_grid"])]
    rows += [grid_positions(*g, origin=o) for (_, g), o in zip(x["references"], origins)]
    ids = np.pad(np.concatenate(rows), ((0, 0), (1, 0))).astype(np.float32)
    out = twin(
        hidden_states=torch.from_numpy(tokens),
        encoder_hidden_states=torch.from_numpy(x["context"]),
        pooled_projections=torch.from_numpy(x["pooled"]),
        timestep=torch.from_numpy(x["t"]),
        guidance=None if x["guidance"] is None else torch.from_numpy(x["guidance"]),
        img_ids=torch.from_numpy(ids),
        txt_ids=torch.zeros(x["context"].shape[1], 3),
    ).sample
    return out[:, : x["target"].shape[1]]


@pytest.mark.parametrize(
    "shape",
    [
        {"references": ()},
        {"batch": 3, "grid": (2, 5), "references": ((2, 3),), "context": 9},
        {"references": ((2, 3), (4, 2), (1, 1))},
    ],
)
@pytest.mark.parametrize("guidance", [True, False])
def test_velocity_equals_diffusers(shape, guidance):
    config = CONFIG if guidance else DiTConfig(**{**vars(CONFIG), "guidance": False})
    torch, twin = torch_twin(config)
    dit = DiT(config, rngs=nnx.Rngs(0))
    weights = {k: v.detach().numpy() for k, v in twin.state_dict().items()}
    load_entries(dit, diffusers_entries(config), weights, weights.__getitem__)
    x = inputs(**shape, config=config)
    with torch.no_grad():
        theirs = run_twin(torch, twin, x)
    assert relative_error(dit(**x), theirs) < 1e-5
    exported = export_entries(dit, diffusers_entries(config))
    assert all(np.array_equal(exported[k], weights[k]) for k in weights)
