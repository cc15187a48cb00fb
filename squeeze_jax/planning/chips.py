"""TPU chips and their published peaks (Google Cloud's "System architecture" pages of each generation)."""

from dataclasses import dataclass

from squeeze_jax.errors import InputError


@dataclass(frozen=True)
class Chip:
    """One chip."""

    name: str
    flops: float
    """Peak bfloat16 FLOP/s."""
    memory: int
    """Bytes of HBM."""
    memory_rate: float
    """HBM bytes/s."""
    link_rate: float
    """Bytes/s between chips (ICI), all links together, one way."""
    network_rate: float
    """Bytes/s between slices (DCN), a host's network shared by its chips."""
    options: tuple[tuple[str, str], ...] = ()
    """What the compiler has to be told besides the topology."""


GIB = 2**30
CHIPS = {
    "v4": Chip("v4", 275e12, 32 * GIB, 1228e9, 300e9, 6.25e9, (("chip_config_name", "megacore"),)),
    "v5e": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, 3.125e9),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1640e9, 448e9, 6.25e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v5p:2x2x4`."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise InputError(f"topology {topology!r}: no chip {name!r}; choose one of {', '.join(CHIPS)}, such as v5p:2x2x2")
    return CHIPS[name]
