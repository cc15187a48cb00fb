"""From a config to modules: the trained system, with its frozen base and its adapters, and which
leaves are trained."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from squeeze_jax.config import Config
from squeeze_jax.interop.formats import format_of
from squeeze_jax.interop.load import (
    autoencoder_of,
    check_transformer,
    dit_source,
    encoder_configs,
    load_autoencoder,
    load_dit,
    load_internvl,
)
from squeeze_jax.layers.int8 import quantise
from squeeze_jax.layers.lora import LoRAParam, add_lora
from squeeze_jax.models.aggregator import Aggregator
from squeeze_jax.models.backbone import Backbone
from squeeze_jax.models.internvl import InternVL
from squeeze_jax.models.online_encoders import Encoders
from squeeze_jax.models.system import System

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.bfloat16}
"""int8 is for kernels; what is beside them is bfloat16."""


def build_system(
    config: Config,
    *,
    with_base: bool = True,
    mesh: Mesh | None = None,
    rngs: nnx.Rngs | None = None,
) -> System:
    """The system of a config: random weights from its seed, pre-trained base where
    `model.dit_weights` names one.

    `with_base=False` leaves the pre-trained base out (its shapes stay): for `nnx.eval_shape`.
    `rngs`: of the random weights, in place of the seed's. Trained weights are float32; a base under
    adapters is kept in `model.frozen_dtype`, and read onto `mesh` where there is one.
    """
    rngs = nnx.Rngs(config.training.seed) if rngs is None else rngs
    dtype, frozen = DTYPES[config.model.dtype], DTYPES[config.model.frozen_dtype]
    kept = jnp.float32 if config.lora is None else frozen
    options = {"remat": config.parallel.remat, "unroll": config.parallel.unroll}
    aggregator = Aggregator(config.aggregator, dtype=dtype, rngs=rngs, **options)
    if config.model.dit_weights and with_base:
        dit = load_base(config, mesh)
    else:
        module = format_of(config.model.dit).module
        dit = module(config.model.dit, dtype=dtype, param_dtype=kept, rngs=rngs, **options)
        if config.model.frozen_dtype == "int8":
            quantise(dit)
    if config.lora is not None:
        add_lora(dit, config.lora, rngs=rngs)
    encoders = None
    if config.data.online:
        encoders = load_encoders(config, mesh) if with_base else random_encoders(config, rngs)
    return System(aggregator, dit, encoders)


def load_encoders(config: Config, mesh: Mesh | None = None) -> Encoders:
    """The frozen encoders for on-line extraction; the MLLM in `model.dtype`, the autoencoder in
    float32, as in records."""
    model = config.model
    return Encoders(
        load_internvl(model.mllm, DTYPES[model.dtype], mesh),
        load_autoencoder(model.autoencoder, mesh=mesh),
    )


def random_encoders(config: Config, rngs: nnx.Rngs) -> Encoders:
    """Encoders of the same sizes, or without folders of the published ones, with random weights:
    for `nnx.eval_shape`."""
    model = config.model
    dtype: Any = DTYPES[model.dtype]
    autoencoder, mllm = encoder_configs(config)
    return Encoders(
        InternVL(mllm, dtype=dtype, param_dtype=dtype, rngs=rngs),
        autoencoder_of(autoencoder)(autoencoder, rngs=rngs),
    )


def load_base(config: Config, mesh: Mesh | None = None) -> Backbone:
    """The transformer that `model.dit_weights` names, without adapters. Raises InputError where
    it is another's."""
    assert config.model.dit_weights is not None
    dtype, frozen = DTYPES[config.model.dtype], DTYPES[config.model.frozen_dtype]
    kept = jnp.float32 if config.lora is None else frozen
    options = {"remat": config.parallel.remat, "unroll": config.parallel.unroll}
    seen = config.model.dit.reference_attention
    check_base(config)
    dit = load_dit(
        config.model.dit_weights,
        kept,
        compute_dtype=dtype,
        mesh=mesh,
        reference_attention=seen,
        **options,
    )
    if config.model.frozen_dtype == "int8":
        quantise(dit)
    return dit


def check_base(config: Config) -> None:
    """Raises InputError where `model.dit_weights` is another transformer than the config's; reads
    no weights."""
    if (weights := config.model.dit_weights) is not None:
        check_transformer(weights, dit_source(weights).config, config.model.dit)


def is_trained(config: Config) -> Callable[[Any, Any], bool]:
    """A filter for `nnx.split`: the aggregator, and the adapters or (without adapters) the whole
    transformer."""
    kind = nnx.Param if config.lora is None else LoRAParam

    def trained(path: tuple[Any, ...], value: Any) -> bool:
        if path[0] == "encoders":
            return False
        variable = getattr(value, "type", type(value))
        return issubclass(variable, nnx.Param if path[0] == "aggregator" else kind)

    return trained
