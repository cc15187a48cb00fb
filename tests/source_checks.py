"""What tests of sources share: opening one, and making records of it with stand-in encoders."""

from fake_encoders import FakeEncoders

from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.sources import open_source
from squeeze_jax.data.sources.contract import Options, parts_of

SIZES = {"target_size": (64, 64), "reference_long_side": 64, "examples_per_shard": 4, "batch": 3}
SKIP = Options(skip_bad=True)


def opened(kind, folder, options=SKIP):
    return open_source(f"{kind}:{folder}", options)


def all_of(rows):
    return [rows[index] for index in range(len(rows))]


def records(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def extracted(rows, out, shard=(0, 1), skip=None):
    encoders = FakeEncoders()
    extract(
        rows,
        encoders,
        out,
        parts=parts_of(rows),
        source=rows.source,
        shard=shard,
        skip=skip,
        **SIZES,
    )
    return encoders
