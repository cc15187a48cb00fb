"""TPU chips and their published peaks (source: Google Cloud's page of each generation)."""

from dataclasses import dataclass

from squeeze_jax.errors import InputError


@dataclass(frozen=True)
class Chip:
    """One chip."""

    flops: float
    """Peak bfloat16 FLOP/s."""
    memory: int
    """Bytes of HBM."""
    memory_rate: float
    """Bytes/s of HBM."""
    reckoned_rate: float
    """Bytes/s of HBM that the TPU compiler assumes (measured: an addition's bytes over its
    optimal seconds)."""
    link_rate: float
    """Published bytes/s between chips (ICI), all links of a chip together."""
    network_rate: float
    """Bytes/s between slices (DCN): a host's 200 or 100 Gbit/s shared by its chips (our decision)."""
    torus_axes: int = 3
    """Axes along which a chip has neighbours."""
    options: tuple[tuple[str, str], ...] = ()
    """Options of the compiler besides the topology."""


GIB = 2**30
"""Bytes."""
CHIPS = {
    "v4": Chip(
        275e12,
        32 * GIB,
        1228e9,
        982.5e9,
        300e9,
        6.25e9,
        options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 737.7e9, 200e9, 3.125e9, torus_axes=2),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 2350.4e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 1638e9, 448e9, 6.25e9, torus_axes=2),
}


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology such as `v5p:2x2x4`. Raises InputError for an unknown one."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise InputError(
            f"topology {topology!r}: no chip {name!r}; choose one of {', '.join(CHIPS)}, such as v5p:2x2x2"
        )
    return CHIPS[name]
