"""A small transformer with weights that hide nothing, its PyTorch twin, and inputs for both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import randomise

from squeeze_jax.diffusion.latents import grid_positions, reference_origins
from squeeze_jax.interop.flux import config_to_json, diffusers_entries
from squeeze_jax.interop.mapping import load_entries
from squeeze_jax.models.dit import DiT, DiTConfig

CONFIG = DiTConfig(
    in_channels=64, context_width=40, pooled_width=24, heads=3, head_width=24,
    num_double_blocks=2, num_single_blocks=3,
    rope_axes=(4, 8, 12),
)  # fmt: skip


def random_dit(config: DiTConfig = CONFIG, seed: int = 0, **kwargs) -> DiT:
    """Ours with every leaf random, norms around 1."""
    dit = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0), **kwargs))  # compiles no initialisation
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(dit, nnx.Param)):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        small = path[-1] == "bias" or path[-1] == "scale"
        value = (path[-1] == "scale") + noise * (0.2 if small else leaf.shape[-2] ** -0.5)
        leaf.set_value(jnp.asarray(value, leaf.dtype))
        nnx.update(dit, nnx.from_flat_state([(path, leaf)]))
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


def compiled(dit, target_grid, grids=()):
    """The call as one compiled function of (state, arrays), and the state: `arrays["references"]` holds tokens alone."""
    graph, state = nnx.split(dit)

    def run(state, arrays):
        arrays = dict(arrays)
        references = list(zip(arrays.pop("references", ()), grids, strict=True))
        return nnx.merge(graph, state)(**arrays, target_grid=target_grid, references=references)

    return jax.jit(run), state


def arrays_of(x):
    """What of `inputs` is arrays."""
    return {k: v for k, v in x.items() if k != "target_grid"} | {"references": [r for r, _ in x["references"]]}


def run(dit, x):
    """`dit(**x)` in one compiled program."""
    function, state = compiled(dit, x["target_grid"], [grid for _, grid in x["references"]])
    return function(state, arrays_of(x))


def torch_twin(config: DiTConfig = CONFIG):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    diffusers = pytest.importorskip("diffusers")
    values = {k: v for k, v in config_to_json(config).items() if not k.startswith("_")}
    twin = diffusers.FluxTransformer2DModel(**values).eval()
    randomise(twin)
    return torch, twin


def like_twin(twin, config: DiTConfig = CONFIG, **kwargs) -> tuple[DiT, dict[str, np.ndarray]]:
    """Ours with the twin's weights, and the weights."""
    dit = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0), **kwargs))
    weights = {k: v.detach().numpy() for k, v in twin.state_dict().items()}
    load_entries(dit, diffusers_entries(config), weights)
    return dit, weights


def run_twin(torch, twin, x, **kwargs):
    """The same call on diffusers' side (NumPy arrays or tensors): references behind the target, positions by hand."""
    tensor = torch.as_tensor
    tokens = torch.cat([tensor(x["target"]), *(tensor(r) for r, _ in x["references"])], dim=1)
    origins = reference_origins(x["target_grid"], [g for _, g in x["references"]])
    rows = [grid_positions(*x["target_grid"])]
    rows += [grid_positions(*g, origin=o) for (_, g), o in zip(x["references"], origins)]
    ids = np.pad(np.concatenate(rows), ((0, 0), (1, 0))).astype(np.float32)
    out = twin(
        hidden_states=tokens,
        encoder_hidden_states=tensor(x["context"]),
        pooled_projections=tensor(x["pooled"]),
        timestep=tensor(x["t"]),
        guidance=None if x["guidance"] is None else tensor(x["guidance"]),
        img_ids=tensor(ids),
        txt_ids=torch.zeros(x["context"].shape[1], 3),
        **kwargs,
    ).sample
    return out[:, : x["target"].shape[1]]
