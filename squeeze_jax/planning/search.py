"""Ranks meshes, remat policies and batch sizes by a simple model, so that only the best few have to
be compiled.

Memory: weights and moments (exact, from the sharding table), residuals of the backward pass (exact,
by tracing), and an allowance for temporaries. Time: all products that run under the policy (by
tracing) at a share of the peak, plus the gathers of the weights over the links.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from squeeze_jax.array_types import PyTree
from squeeze_jax.config import Config, StageConfig
from squeeze_jax.layers.splash import padded
from squeeze_jax.layers.stack import Remat
from squeeze_jax.planning.chips import GIB, Chip
from squeeze_jax.planning.estimate import sequence
from squeeze_jax.planning.flops import matmul_flops
from squeeze_jax.planning.network import crosses_slices, link_rate
from squeeze_jax.planning.train_program import (
    abstract_input,
    abstract_system,
    count,
    loss_of,
    placed,
)
from squeeze_jax.training.state import state_shardings

POLICIES: tuple[Remat, ...] = ("save_products", "save_attention", "block")
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PRODUCTS_SHARE = 0.6
"""Share of the published peak that a whole step reaches (from plans by XLA)."""
OPTIMIZER_PASSES = 8
"""Float32 reads and writes of an update for each trained value: gradient, moments, weights, norm."""
ROOM, ROOM_PER_EXAMPLE = 2 * GIB, GIB // 2
"""Bytes of temporaries beside the residuals: gathered matrices and one block's work (from
compiled programs)."""


@dataclass(frozen=True)
class Candidate:
    """A mesh, policy and batch, with the model's memory and time."""

    mesh: Mesh
    remat: Remat
    batch: int
    """Examples a chip."""
    memory: float
    """Bytes a chip."""
    seconds: float
    """Of a step."""

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


def candidates(
    config: Config, meshes: list[Mesh], chip: Chip, stage: StageConfig, references: int = 1
) -> list[Candidate]:
    """Returns what fits by the model, fastest first; for each mesh and policy the best batch alone."""
    best: dict[Any, Candidate] = {}
    for one in _all(config, meshes, chip, stage, references):
        key = (tuple(one.mesh.shape.values()), one.remat)
        if one.memory <= chip.memory and (key not in best or one.rate > best[key].rate):
            best[key] = one
    return sorted(best.values(), key=lambda one: -one.rate)


def _all(
    config: Config, meshes: list[Mesh], chip: Chip, stage: StageConfig, references: int
) -> Iterator[Candidate]:
    state, split = abstract_system(config)
    for remat in POLICIES:
        under = replace(config, parallel=replace(config.parallel, remat=remat))
        flops, kept = traced(under, stage, references)
        kept += _kernel_inputs(config, references) if remat == "save_products" else 0
        for mesh in meshes:
            tensor = mesh.shape["tensor"]
            resident = _bytes_on_a_chip(jax.tree.map(_with, state, state_shardings(state, mesh)))
            frozen = placed(split.frozen, mesh)
            weights, gradients = (
                _bytes_on_a_chip(frozen),
                4 * count(state.params) / mesh.shape["fsdp"] / tensor,
            )
            once = OPTIMIZER_PASSES * gradients / chip.memory_rate + _communication(
                config, mesh, chip, frozen, gradients
            )
            passed = (
                _exchanged(config, references)
                * _ring(mesh, "tensor")
                / link_rate(mesh, ("tensor",), chip)
            )
            for batch in BATCHES:
                memory = (
                    resident
                    + weights
                    + gradients
                    + ROOM
                    + batch * (kept + ROOM_PER_EXAMPLE) / tensor
                )
                seconds = once + batch * (flops / tensor / (PRODUCTS_SHARE * chip.flops) + passed)
                yield Candidate(mesh, remat, batch, memory, seconds)


def _communication(
    config: Config, mesh: Mesh, chip: Chip, frozen: nnx.State, gradients: float
) -> float:
    """Seconds a step to gather matrices, forward and backward, and to sum gradients over the data
    axis in bfloat16.

    Over all axes of a closed torus the compiler gathers by an all-reduce of mostly zeros, which
    sends twice as much.
    """
    rate = link_rate(mesh, ("fsdp",), chip)
    passes = 4 if mesh.shape["fsdp"] > 1 and chip.torus_axes == 3 and rate == chip.link_rate else 2
    matrices = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen)) / mesh.shape["tensor"]
    )
    outside = (
        chip.network_rate if crosses_slices(mesh, ("data",)) else link_rate(mesh, ("data",), chip)
    )
    return (
        passes * matrices * _ring(mesh, "fsdp") / rate + gradients * _ring(mesh, "data") / outside
    )


def _exchanged(config: Config, references: int) -> float:
    """Bytes an example that the tensor axis sums: the activations, about four times a block,
    twice each."""
    dit = config.model.dit
    blocks = dit.num_double_blocks + dit.num_single_blocks
    return 8.0 * blocks * sum(sequence(config, references)) * dit.width * 2


def _kernel_inputs(config: Config, references: int) -> int:
    """Bytes an example of the padded q, k and v that the TPU's kernel keeps; a trace on CPU does
    not have them."""
    dit = config.model.dit
    blocks = dit.num_double_blocks + dit.num_single_blocks
    return 3 * blocks * padded(sum(sequence(config, references))) * dit.width * 2


def _ring(mesh: Mesh, axis: str) -> float:
    """Share of a gathered array that comes from other chips."""
    return 1 - 1 / mesh.shape[axis]


def traced(config: Config, stage: StageConfig, references: int = 1) -> tuple[int, int]:
    """Returns an example's FLOPs under the config's policy, recomputed ones included, and its
    residuals' bytes."""
    loss, (trained, frozen) = loss_of(config, stage)
    flops = matmul_flops(
        jax.value_and_grad(loss), trained, frozen, abstract_input(config, 1, references)
    )

    def pull(trained: PyTree, frozen: nnx.State, batch: PyTree) -> PyTree:
        return jax.vjp(lambda trained: loss(trained, frozen, batch), trained)[1]

    def kept(rows: int) -> int:
        residuals = jax.eval_shape(pull, trained, frozen, abstract_input(config, rows, references))
        return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(residuals))

    return flops, kept(2) - kept(1)


def _with(x: PyTree, where: PyTree) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _bytes_on_a_chip(tree: PyTree) -> int:
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )
