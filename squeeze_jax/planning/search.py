"""Which mesh, policy and batch are worth a compile: all of them ranked by hand, nothing compiled.

A candidate's memory is its weights and moments (exact, from the sharding table) plus what the backward pass keeps (exact,
traced) plus room to work; its time is the products that it runs, traced under its policy, at a share of the peak, plus
the weights' gathers over the links. The compiler has the last word on the best few.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from squeeze_jax.config import Config, StageConfig
from squeeze_jax.layers.splash import padded
from squeeze_jax.layers.stack import Remat
from squeeze_jax.planning.chips import GIB, Chip
from squeeze_jax.planning.estimate import sequence
from squeeze_jax.planning.flops import matmul_flops
from squeeze_jax.planning.network import crosses_slices, link_rate
from squeeze_jax.planning.train_program import abstract_input, abstract_system, count, loss_of, placed
from squeeze_jax.training.state import state_shardings

POLICIES: tuple[Remat, ...] = ("save_products", "save_attention", "block")
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PRODUCTS_SHARE = 0.6
"""Of the published peak, what a step's products reach with everything between them (the planner's own figures)."""
OPTIMIZER_PASSES = 8
"""Times that an update reads or writes a float32 of each trained value: gradient, moments, weights, norm."""
ROOM, ROOM_PER_EXAMPLE = 2 * GIB, GIB // 2
"""Temporaries beside what is kept: gathered matrices, and one block's work (from compiled programs)."""


@dataclass(frozen=True)
class Candidate:
    """A way to run, and what to expect by hand."""

    mesh: Mesh
    remat: Remat
    batch: int
    """Examples a chip."""
    memory: float
    """Bytes a chip."""
    seconds: float

    @property
    def rate(self) -> float:
        """Examples a second of all chips."""
        return self.batch * self.mesh.shape["data"] * self.mesh.shape["fsdp"] / self.seconds

    def config(self, config: Config) -> Config:
        """The config with this policy and batch."""
        return replace(
            config,
            parallel=replace(config.parallel, remat=self.remat),
            data=replace(config.data, batch_per_chip=self.batch),
        )


def candidates(config: Config, meshes: list[Mesh], chip: Chip, stage: StageConfig, references: int = 1) -> list[Candidate]:
    """All that fit by hand, the most examples a second first; of equal policy and mesh, the best batch alone."""
    best: dict[Any, Candidate] = {}
    for one in _all(config, meshes, chip, stage, references):
        key = (tuple(one.mesh.shape.values()), one.remat)
        if one.memory <= chip.memory and (key not in best or one.rate > best[key].rate):
            best[key] = one
    return sorted(best.values(), key=lambda one: -one.rate)


def _all(config: Config, meshes: list[Mesh], chip: Chip, stage: StageConfig, references: int) -> Iterator[Candidate]:
    state, split = abstract_system(config)
    for remat in POLICIES:
        under = replace(config, parallel=replace(config.parallel, remat=remat))
        flops, kept = traced(under, stage, references)
        kept += _kernel_inputs(config, references) if remat == "save_products" else 0
        for mesh in meshes:
            tensor = mesh.shape["tensor"]
            resident = _bytes_on_a_chip(jax.tree.map(_with, state, state_shardings(state, mesh)))
            frozen = placed(split.frozen, mesh)
            weights, gradients = _bytes_on_a_chip(frozen), 4 * count(state.params) / mesh.shape["fsdp"] / tensor
            once = OPTIMIZER_PASSES * gradients / chip.memory_rate + _communication(config, mesh, chip, frozen, gradients)
            passed = _exchanged(config, references) * _ring(mesh, "tensor") / link_rate(mesh, ("tensor",), chip)
            for batch in BATCHES:
                memory = resident + weights + gradients + ROOM + batch * (kept + ROOM_PER_EXAMPLE) / tensor
                seconds = once + batch * (flops / tensor / (PRODUCTS_SHARE * chip.flops) + passed)
                yield Candidate(mesh, remat, batch, memory, seconds)


def _communication(config: Config, mesh: Mesh, chip: Chip, frozen: nnx.State, gradients: float) -> float:
    """Seconds a step: matrices gathered forward and backward, gradients summed over copies of the model in bfloat16.

    Over all axes of a closed torus the compiler gathers by a sum of mostly zeros, which is twice as much.
    """
    rate = link_rate(mesh, ("fsdp",), chip)
    passes = 4 if mesh.shape["fsdp"] > 1 and chip.torus_axes == 3 and rate == chip.link_rate else 2
    matrices = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen)) / mesh.shape["tensor"]
    outside = chip.network_rate if crosses_slices(mesh, ("data",)) else link_rate(mesh, ("data",), chip)
    return passes * matrices * _ring(mesh, "fsdp") / rate + gradients * _ring(mesh, "data") / outside


def _exchanged(config: Config, references: int) -> float:
    """Bytes an example that the tensor axis sums: a stream of activations, about four times a block, twice each."""
    dit = config.model.dit
    blocks = dit.num_double_blocks + dit.num_single_blocks
    return 8.0 * blocks * sum(sequence(config, references)) * dit.width * 2


def _kernel_inputs(config: Config, references: int) -> int:
    """Bytes an example of queries, keys and values in whole blocks, which exist on TPU alone: not in a trace made here."""
    dit = config.model.dit
    blocks = dit.num_double_blocks + dit.num_single_blocks
    return 3 * blocks * padded(sum(sequence(config, references))) * dit.width * 2


def _ring(mesh: Mesh, axis: str) -> float:
    """Of what is gathered along an axis, the share that comes from other chips."""
    return 1 - 1 / mesh.shape[axis]


def traced(config: Config, stage: StageConfig, references: int = 1) -> tuple[int, int]:
    """Of one example under the config's policy: FLOPs of all products that are run, and bytes that the backward keeps."""
    loss, (trained, frozen) = loss_of(config, stage)
    flops = matmul_flops(jax.value_and_grad(loss), trained, frozen, abstract_input(config, 1, references))

    def pull(trained: Any, frozen: nnx.State, batch: Any) -> Any:
        return jax.vjp(lambda trained: loss(trained, frozen, batch), trained)[1]

    def kept(rows: int) -> int:
        residuals = jax.eval_shape(pull, trained, frozen, abstract_input(config, rows, references))
        return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(residuals))

    return flops, kept(2) - kept(1)


def _with(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _bytes_on_a_chip(tree: Any) -> int:
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
