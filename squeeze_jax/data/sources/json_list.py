"""`FILE.json`: a list of `prompt`, `image_paths`, `image_tgt_path` (`data/manifest.py`)."""

from pathlib import Path

from squeeze_jax.data.manifest import read_manifest
from squeeze_jax.data.sources.contract import Opened, Options, refuse_scores
from squeeze_jax.data.sources.listed import opened


def open_rows(path: Path, options: Options) -> Opened:
    """Rows of a manifest, a JSON list."""
    refuse_scores(options, "a JSON list")
    manifest = read_manifest(
        path,
        need_targets=True,
        check_images=options.check_images,
        skip_bad=options.skip_bad,
        limit=options.limit,
        image_root=options.image_root,
    )
    return opened("manifest", manifest)
