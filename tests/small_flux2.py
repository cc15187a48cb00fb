"""A small FLUX.2 with weights that hide nothing, its PyTorch twin, and inputs for both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import randomise

from squeeze_jax.interop.flux2 import config_to_json, diffusers_entries
from squeeze_jax.interop.mapping import load_entries, parameters_by_path
from squeeze_jax.models.flux2 import Flux2, Flux2Config

CONFIG = Flux2Config(
    in_channels=16, context_width=40, heads=3, head_width=32, num_double_blocks=2, num_single_blocks=3,
    mlp_ratio=2.5, rope_axes=(6, 8, 8, 10),
)  # fmt: skip
REFERENCES = ((2, 3), (4, 2), (1, 1))


def random_flux2(config: Flux2Config = CONFIG, seed: int = 0, **kwargs) -> Flux2:
    """Ours with every leaf random, norms around 1."""
    model = nnx.eval_shape(lambda: Flux2(config, rngs=nnx.Rngs(0), **kwargs))  # compiles nothing
    rng = np.random.default_rng(seed)
    for path, leaf in parameters_by_path(model).items():
        noise = rng.standard_normal(leaf.shape)
        value = 1 + 0.2 * noise if path.endswith("scale") else noise * leaf.shape[-2] ** -0.5
        leaf.set_value(jnp.asarray(value, leaf.dtype))
        nnx.update(model, nnx.from_flat_state([(tuple(path.split(".")), leaf)]))
    return model


def inputs(batch=2, grid=(4, 6), references=REFERENCES, context=5, seed=1, config=CONFIG):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "target": normal(batch, grid[0] * grid[1], config.in_channels),
        "context": normal(batch, context, config.context_width),
        "t": np.linspace(0.3, 0.9, batch).astype(np.float32),
        "guidance": np.linspace(1.0, 4.0, batch).astype(np.float32) if config.guidance else None,
        "target_grid": grid,
        "references": [(normal(batch, h * w, config.in_channels), (h, w)) for h, w in references],
    }


def compiled(model, target_grid, grids=()):
    """The call as a compiled function of (state, arrays), and the state; references are tokens."""
    graph, state = nnx.split(model)

    def run(state, arrays):
        arrays = dict(arrays)
        references = list(zip(arrays.pop("references", ()), grids, strict=True))
        return nnx.merge(graph, state)(**arrays, target_grid=target_grid, references=references)

    return jax.jit(run), state


def arrays_of(x):
    """What of `inputs` is arrays."""
    return {k: v for k, v in x.items() if k != "target_grid"} | {
        "references": [tokens for tokens, _ in x["references"]]
    }


def run(model, x):
    """`model(**x)` in one compiled program."""
    function, state = compiled(model, x["target_grid"], [grid for _, grid in x["references"]])
    return function(state, arrays_of(x))


def torch_twin(config: Flux2Config = CONFIG):
    """diffusers' model of the same sizes, with random weights."""
    torch = pytest.importorskip(
        "torch", reason="PyTorch is not installed: parity tests are skipped"
    )
    diffusers = pytest.importorskip("diffusers")
    values = {k: v for k, v in config_to_json(config).items() if not k.startswith("_")}
    twin = diffusers.Flux2Transformer2DModel(**values).eval()
    randomise(twin)
    return torch, twin


def like_twin(twin, config: Flux2Config = CONFIG, **kwargs) -> Flux2:
    """Ours with the twin's weights."""
    model = nnx.eval_shape(lambda: Flux2(config, rngs=nnx.Rngs(0), **kwargs))
    weights = {k: v.detach().numpy() for k, v in twin.state_dict().items()}
    load_entries(model, diffusers_entries(config), weights)
    return model


def ids_of(torch, target_grid, grids):
    """Positions of target and references by the pipeline's own functions, each [tokens, 4]."""
    from diffusers import Flux2KleinPipeline

    target = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 1, *target_grid))[0]
    references = [torch.zeros(1, 1, *grid) for grid in grids]
    if not references:
        return target, target[:0]
    return target, Flux2KleinPipeline._prepare_image_ids(references)[0]


def text_ids(torch, length):
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, length, 1))[0]


def run_twin(torch, twin, x, txt_ids=None):
    """The same call on diffusers' side (NumPy arrays or tensors): references behind the target."""
    tensor = torch.as_tensor
    tokens = torch.cat([tensor(x["target"]), *(tensor(r) for r, _ in x["references"])], dim=1)
    ids = ids_of(torch, x["target_grid"], [g for _, g in x["references"]])
    out = twin(
        hidden_states=tokens,
        encoder_hidden_states=tensor(x["context"]),
        timestep=tensor(x["t"]),
        guidance=None if x["guidance"] is None else tensor(x["guidance"]),
        img_ids=torch.cat(ids),
        txt_ids=text_ids(torch, x["context"].shape[1]) if txt_ids is None else txt_ids,
    ).sample
    return out[:, : x["target"].shape[1]]
