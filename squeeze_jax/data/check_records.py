"""Whether feature records are what a config trains on."""

from etils import epath

from squeeze_jax.config import Config
from squeeze_jax.data.records import read_metadata
from squeeze_jax.errors import InputError


def check_records(folder: epath.Path, config: Config) -> None:
    """Raises InputError unless a folder's records fit the config's transformer and aggregator, and
    were made with its settings."""
    metadata = read_metadata(folder)
    data, made_with = config.data, metadata.settings
    encoders = made_with.get("encoders", {})
    long_side = made_with.get("reference_long_side", data.reference_long_side)
    for name, theirs, ours in (
        ("reference_long_side", long_side, data.reference_long_side),
        ("system_text", encoders.get("system_text", data.system_text), data.system_text),
        ("max_tiles", encoders.get("max_tiles", 1), data.max_tiles),
    ):
        if theirs != ours:
            raise InputError(
                f"{folder}: made with data.{name} {theirs!r}, this config has {ours!r}; "
                "extract with this config"
            )
    channels = config.model.dit.in_channels // 4
    shapes = [(2 * rows, 2 * columns, channels) for rows, columns in config.training_grids]
    width = metadata.summary.shape.width
    for what, theirs, ours in (
        ("latents of targets", metadata.target_shapes, shapes),
        ("width of hidden states", [width], [config.aggregator.width]),
    ):
        if not set(theirs) <= set(ours):
            theirs, ours = (", ".join(map(str, some)) for some in (theirs, ours))
            raise InputError(
                f"{folder}: {what} are {theirs}, this config wants {ours}; extract with this config"
            )
