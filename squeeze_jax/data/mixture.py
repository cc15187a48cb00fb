"""Record folders as one data set: their records are numbered on, one folder behind the other.

No JAX is imported here, since data workers run this file.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain

from etils import epath

from squeeze_jax.config_data import DataConfig
from squeeze_jax.data.record_format import FeatureRecord, Shape
from squeeze_jax.data.record_summary import MAXIMA, ShardSummary, join_captions
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.errors import InputError
from squeeze_jax.storage import reachable

Weighted = Sequence[tuple[epath.PathLike, float]]
"""Folders of feature records, and how often their examples come, in proportion."""


def record_folders(data: DataConfig, features: epath.PathLike) -> list[tuple[epath.Path, float]]:
    """The folders of a config's records, each with train and held_out below it, and their weights;
    `features` where it names no `mix`."""
    return [(reachable(folder), weight) for folder, weight in data.mix or ((features, 1.0),)]


class Mixture:
    """The records of one or several folders by number; threads may share it."""

    def __init__(self, folders: Weighted, layers: Sequence[int] | None = None) -> None:
        """layers: as `FeatureSource`. Raises InputError where records do not go together."""
        self.sources = [FeatureSource(folder, layers) for folder, _ in folders]
        self.weights = [weight for _, weight in folders]
        held = {source.metadata.layers for source in self.sources}
        if layers is None and len(held) > 1:
            raise InputError(f"{self._names()}: they hold different hidden states of the MLLM")
        made_by = [source.metadata.settings.get("encoders", {}) for source in self.sources]
        if any(one != made_by[0] for one in made_by):
            raise InputError(
                f"{self._names()}: made by different encoders; extract them with one config"
            )
        self.starts = [0, *accumulate(len(source) for source in self.sources)][:-1]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, number: int) -> FeatureRecord:
        place = bisect_right(self.starts, number) - 1
        return self.sources[place][number - self.starts[place]]._replace(number=number)

    def summary(self) -> ShardSummary:
        """Of all records together. Raises InputError where they cannot be in one batch."""
        summaries = [source.metadata.summary for source in self.sources]
        if len(summaries) == 1:
            return summaries[0]
        shapes = [summary.shape for summary in summaries]
        if len({(shape.width, shape.target[2]) for shape in shapes}) > 1:
            found = ", ".join(f"{shape.width} and {shape.target[2]}" for shape in shapes)
            raise InputError(
                f"{self._names()}: widths of hidden states and channels of latents differ "
                f"({found}); extract them with one config"
            )
        targets = {shape.target for shape in shapes}
        known = all(summary.sizes for summary in summaries)
        if len(targets) > 1 and not known:
            raise InputError(
                f"{self._names()}: targets are of several sizes, and one of the folders is from "
                "before the sizes of records were kept; extract it again"
            )
        target = targets.pop() if len(targets) == 1 else (None, None, shapes[0].target[2])
        return ShardSummary(
            records=len(self),
            shape=Shape(shapes[0].layers, shapes[0].width, target),
            sizes=tuple(chain.from_iterable(s.sizes for s in summaries)) if known else (),
            captions=join_captions(summaries),
            **{name: max(getattr(s, name) for s in summaries) for name in MAXIMA},
        )

    def _names(self) -> str:
        return " and ".join(str(source.folder) for source in self.sources)
