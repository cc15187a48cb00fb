"""Compiles the real train step for a TPU topology, without owning such a TPU."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from squeeze_jax.batch import HiddenStates, RawBatch, References, TrainingBatch
from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.config import Config, StageConfig, global_batch
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import encoder_configs
from squeeze_jax.planning.chips import Chip, chip_of
from squeeze_jax.planning.collectives import Collective, bytes_of, collectives
from squeeze_jax.planning.flops import matmul_flops
from squeeze_jax.sharding import batch_sharding, make_mesh, shardings
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import (
    Split,
    TrainState,
    initial_state,
    split_system,
    state_shardings,
)
from squeeze_jax.training.step import (
    Batch,
    compute_losses,
    make_train_step,
    sample_randomness,
    step_key,
    target_shape,
)

IMAGE_TOKENS = 256
"""Of one tile in the MLLM's sequence (InternVL3)."""


CODE_OPTIONS = {
    "xla_jf_convolution_performance_target": "0.1",
    "xla_jf_vliw_scheduler": "false",
}
"""Options of the TPU compiler under which it spends little time on machine code, which nobody runs
here: on a block of FLUX.2 it then needs a fifth of the time. What a plan reads (memory, collectives
and the estimate of time) is settled before and stays the same to the bit."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program; bytes on one chip."""

    arguments: int
    temporaries: int
    output: int
    aliased: int
    """Bytes of the output that reuse the memory of donated arguments."""
    seconds: float
    """Seconds that compiling took."""
    optimal: float
    """Seconds that the compiler expects the program to take on a chip. It counts products and
    HBM traffic; of collectives and Pallas kernels their HBM traffic alone; of a loop its body
    once."""
    moved: float
    """Bytes between a chip and its HBM, counted in the same way."""
    prefetched: int
    """Bytes that asynchronous copies move between HBM and fast memory while the chip computes
    something else. The compiler counts each byte four times in `optimal` and `moved` (read and
    written, at the copy's start and at its end), as if the chip waited for it."""
    collectives: list[Collective]
    text: str

    @property
    def total(self) -> int:
        """Bytes a chip."""
        return self.arguments + self.temporaries + self.output - self.aliased

    def expected(self, chip: Chip) -> float:
        """Returns `optimal` without the asynchronous copies."""
        return self.optimal - 4 * self.prefetched / chip.reckoned_rate

    @property
    def traffic(self) -> float:
        """`moved` without the asynchronous copies, since the instruction that uses a copied byte
        counts it, too."""
        return self.moved - 4 * self.prefetched


def prefetched(text: str) -> int:
    """Returns the bytes of a program's asynchronous copies, each copy counted once."""
    return sum(
        bytes_of(*found) for found in re.findall(r"= \((\w+)\[([\d,]*)\].* copy-start\(", text)
    )


class TooLargeError(InputError):
    """The compiler refused a program for its size."""

    def __init__(self, needed: float) -> None:
        super().__init__(f"the compiler needs {needed:.1f} GiB of HBM a chip, more than there is")
        self.needed = round(needed * 2**30)
        """Bytes on a chip: of arguments and temporaries, or of temporaries alone where the
        compiler stopped there."""


def too_large(message: str) -> TooLargeError | None:
    """Returns the compiler's message as a `TooLargeError`; None where it is not about HBM."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    found = re.search(r"Used ([\d.]+)([MGT]) of|temporaries \(([\d.]+)([MGT])\)", message)
    if found is None:
        return None
    size, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return TooLargeError(float(size) * {"M": 2**-10, "G": 1.0, "T": 2.0**10}[unit])


def topology_mesh(
    topology: str, sizes: dict[str, int], slices: int = 1, heads: int = 0
) -> tuple[Mesh, Chip]:
    """Returns a mesh over the chips of a described topology, and what chip that is.

    Raises InputError for an unknown topology or a mesh that cannot lie on it.
    """
    from jax.experimental import topologies

    chip = chip_of(topology)
    if find_spec("libtpu") is None:
        raise InputError('the TPU compiler is not installed; run `pip install "jax[tpu]"`')
    options: dict[str, Any] = dict(chip.options)
    if slices > 1:
        options["num_slices"] = slices
    if set(topology.partition(":")[2].split("x")) == {"1"}:  # a host has four chips unless told
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(topology, "tpu", **options).devices
    except Exception as error:  # the plugin raises plain runtime errors of many texts
        raise InputError(
            f"topology {topology!r}: the TPU compiler does not know it ({error})"
        ) from None
    return make_mesh(**sizes, devices=devices, heads=heads), chip


def abstract_batch(config: Config, rows: int, references: int = 1) -> TrainingBatch:
    """Returns a batch's shapes, for the longest text and that many square references an example."""
    height, width = config.target_grid
    side = config.data.reference_long_side // (2 * config.model.latent_pixels)
    channels, layers, mllm = (
        config.model.dit.in_channels,
        len(config.aggregator.reads),
        config.aggregator.width,
    )

    def shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((rows, *sizes), dtype)

    def tokens(length: int) -> tuple[Any, Any, Any]:
        states = shape(layers, length, mllm, dtype=jnp.bfloat16)
        return states, shape(length, dtype=jnp.bool_), shape(length, dtype=jnp.int32)

    length = references * side * side
    axes = config.model.dit.reference_positions((height, width), ()).shape[-1]
    tiles = config.data.tiles_per_reference
    return TrainingBatch(
        shape(height * width, channels),
        HiddenStates(
            *tokens(config.data.max_text_tokens), *tokens(references * tiles * IMAGE_TOKENS)
        ),
        References(
            shape(length, channels),
            shape(length, dtype=jnp.bool_),
            shape(length, axes, dtype=jnp.int32),
        ),
        shape(dtype=jnp.int32),
    )


def abstract_input(config: Config, rows: int, references: int = 1) -> Batch:
    """Returns the shapes of a train step's batch: features or, with `data.online`, pictures and
    token ids."""
    if not config.data.online:
        return abstract_batch(config, rows, references)
    data, mllm = config.data, encoder_configs(config)[1]
    tiles = references * data.tiles_per_reference
    length = data.max_text_tokens + tiles * mllm.image_tokens
    side, tile = data.reference_long_side, mllm.vision.image_size

    def shape(*sizes: int, dtype: Any = jnp.uint8) -> Any:
        return jax.ShapeDtypeStruct((rows, *sizes), dtype)

    return RawBatch(
        target=shape(data.height, data.width, 3),
        references=shape(references, side, side, 3),
        reference_count=shape(dtype=jnp.int32),
        ids=shape(length, dtype=jnp.int32),
        valid=shape(length, dtype=jnp.bool_),
        tiles=shape(tiles, tile, tile, 3),
        index=shape(dtype=jnp.int32),
    )


def abstract_system(config: Config) -> tuple[TrainState, Split]:
    """Returns the shapes of a training state and of the frozen rest; reads and makes no weights."""
    system = nnx.eval_shape(lambda: build_system(config, with_base=False))
    trained, split = split_system(system, config)
    optimizer = make_optimizer(config)
    return jax.eval_shape(lambda leaves: initial_state(leaves, optimizer, config), trained), split


def compile_train_step(
    config: Config, mesh: Mesh, stage: StageConfig, references: int = 1
) -> Compiled:
    """Compiles the step that `train` runs, for the mesh."""
    state, split = abstract_system(config)
    where = state_shardings(state, mesh)
    rows = global_batch(config, mesh.shape)
    examples = batch_sharding(mesh)
    batch = jax.tree.map(lambda x: _placed(x, examples), abstract_input(config, rows, references))
    frozen = placed(split.frozen, mesh)
    step = make_train_step(split, make_optimizer(config), config, stage, where)
    return compiled(step, mesh, jax.tree.map(_placed, state, where), frozen, batch)


def compiled(function: Any, mesh: Mesh, *arguments: Any, trips: Sequence[int] = ()) -> Compiled:
    """Compiles a jitted function for shapes that have a sharding.

    `trips`: how often each loop runs whose end the program does not know, in their order. Raises
    TooLargeError where the program does not fit into a chip's HBM.
    """
    began = time.perf_counter()
    lowered = function.lower(*arguments)
    options = CODE_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    try:
        program = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        raise (too_large(str(error)) or error) from None
    memory, text, cost = program.memory_analysis(), program.as_text(), program.cost_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        time.perf_counter() - began,
        cost["optimal_seconds"] % 1.0
        if cost["optimal_seconds"] < 0
        else cost["optimal_seconds"],  # unknown counts as -1 s
        cost["bytes accessed"],
        prefetched(text),
        collectives(text, dict(mesh.shape), trips),
        text,
    )


def step_flops(config: Config, stage: StageConfig, rows: int, references: int = 1) -> int:
    """Returns the model FLOPs of a step of `rows` examples.

    They are those of the forward pass, of the activations' gradients and of the trained weights'
    gradients; what rematerialisation computes again is not counted again.
    """
    return rows * example_flops(config, stage, abstract_input(config, 1, references))


def example_flops(config: Config, stage: StageConfig, batch: Batch) -> int:
    """Returns the model FLOPs of a step on a batch of one example, given as arrays or shapes."""
    plain = replace(config, parallel=replace(config.parallel, remat="none"))
    loss, (trained, frozen) = loss_of(plain, stage)
    return matmul_flops(jax.value_and_grad(loss), trained, frozen, batch)


def forward_flops(config: Config, stage: StageConfig, references: int = 1) -> int:
    """Returns the FLOPs of one example's loss without gradients."""
    loss, leaves = loss_of(config, stage)
    return matmul_flops(loss, *leaves, abstract_input(config, 1, references))


def loss_of(
    config: Config, stage: StageConfig
) -> tuple[Callable[..., jax.Array], tuple[Any, nnx.State]]:
    """Returns the training loss as a function of (trained, frozen, batch), and the shapes of the
    former two. The loss is a scalar."""
    state, split = abstract_system(config)

    def loss(trained: Any, frozen: nnx.State, batch: Batch) -> jax.Array:
        draws = sample_randomness(step_key(config, 0), target_shape(batch, config), config, stage)
        return jnp.mean(compute_losses(split.merge(trained, frozen), batch, draws, config, stage))

    return loss, (state.params, split.frozen)


def placed(state: nnx.State, mesh: Mesh, prefix: str = "") -> nnx.State:
    """Gives each shape of a state the sharding that the table has for `prefix` + its path."""
    flat = [
        (".".join(map(str, path)), path, variable) for path, variable in nnx.to_flat_state(state)
    ]
    places = shardings({prefix + name: variable.get_value() for name, _, variable in flat}, mesh)
    return nnx.from_flat_state(
        [(path, v.replace(_placed(v.get_value(), places[prefix + name]))) for name, path, v in flat]
    )


def _placed(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def count(tree: Any) -> int:
    """Returns the number of values in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
