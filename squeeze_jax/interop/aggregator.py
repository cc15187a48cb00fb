"""The aggregator as exported folders have it: the names of `torch_files/squeeze_aggregator.py`."""

import dataclasses

from squeeze_jax.array_types import Json
from squeeze_jax.interop.mapping import Entry
from squeeze_jax.models.aggregator import AggregatorConfig

NORMS = ("norm1", "norm2", "norm_q", "norm_k")
LINEARS = ("to_qkv", "to_gate", "to_out", "ff_gate", "ff_up", "ff_down")


def entries(config: AggregatorConfig) -> list[Entry]:
    """The table."""
    table: list[Entry] = []

    def blocks(ours: str, theirs: str, count: int) -> None:
        for i in range(count):
            table.extend(
                Entry((f"{theirs}.{i}.{name}.weight",), f"{ours}.{name}.scale", layer=i)
                for name in NORMS
            )
            for name in LINEARS:
                table.append(
                    Entry((f"{theirs}.{i}.{name}.weight",), f"{ours}.{name}.kernel", "linear", i)
                )

    for pool in config.pools:
        blocks(f"pools.{pool}.layer_blocks", f"pools.{pool}.blocks", config.layer_blocks)
        table.append(Entry((f"pools.{pool}.projector",), f"pools.{pool}.projector"))
    if config.kind == "last_layer_vit":
        table.append(Entry(("vision_weight",), "vision_weight"))
    blocks("refiner_blocks", "refiner_blocks", config.refiner_blocks)
    table.append(Entry(("out.weight",), "out.kernel", "linear"))
    table.append(Entry(("out.bias",), "out.bias"))
    return table


def config_to_json(config: AggregatorConfig) -> Json:
    """The folder's `config.json`: the fields of our config."""
    return {**dataclasses.asdict(config), "layers": list(config.layers)}
