"""How a trained aggregator uses the MLLM's layers: its learned weights, and its attention over
layers, for text and image tokens apart.

Attention depends on the tokens, so examples are needed: records, or the shipped pictures.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from squeeze_jax.array_types import Array, Bool, Float
from squeeze_jax.batch import HiddenStates
from squeeze_jax.checkpoints.manager import check_leaves, read_weights
from squeeze_jax.config import Config
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.images import load_image
from squeeze_jax.data.pipeline import make_dataset
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import DEMO
from squeeze_jax.interop.tensors import write_beside, write_json
from squeeze_jax.layers.linear import FLOAT32
from squeeze_jax.layers.stack import scan_blocks
from squeeze_jax.models.aggregator import Aggregator, FusionBlock, LayerPool
from squeeze_jax.storage import AnyPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

MODALITIES = ("text", "image")
EXAMPLES = 16
"""Examples over which attention is averaged."""


class LayerUse(NamedTuple):
    """Of one modality; M layers in the order of the config's `aggregator.layers`."""

    weights: list[float]
    """The learned mix of the layers: with a sign, and not of sum 1."""
    shares: list[float]
    """Of sum 1: each layer's weight times the norm of what it weighs, averaged over tokens."""
    attention: list[list[list[float]]]
    """[block][from layer][to layer], averaged over tokens and heads; each row sums to 1."""


class Inspection(NamedTuple):
    """What is known of an aggregator."""

    checkpoint: str
    step: int | None
    kind: str
    layers: list[int]
    """The MLLM's hidden states that it reads, 0 = input embeddings."""
    examples: int
    use: dict[str, LayerUse]
    """By modality; empty for kinds that pool no layers."""
    vision_weight: float | None
    """Of `last_layer_vit`: the vision tower's share at image tokens, 0 to 1."""


def inspect_checkpoint(folder: AnyPath, features: epath.PathLike | None = None) -> Inspection:
    """Looks at the aggregator of a work, weights or exported folder.

    features: held-out records to average attention over; None: the shipped pictures and prompts,
    read by the checkpoint's own MLLM. Raises InputError for what cannot be read.
    """
    config, leaves, step = read_weights(folder)
    aggregator = _load_aggregator(config, leaves, folder)
    use, count = {}, 0
    if aggregator.pools:
        examples = list(_examples(config, features))
        count = sum(len(states.text) for states in examples)
        use = {name: _modality(aggregator, name, examples) for name in MODALITIES}
    vision = getattr(aggregator, "vision_weight", None)
    return Inspection(
        "the shipped miniature" if folder == DEMO / "system" else str(folder),
        step,
        config.aggregator.kind,
        list(config.aggregator.reads),
        count,
        use,
        None if vision is None else float(jax.nn.sigmoid(vision[...].astype(jnp.float32))),
    )


def _load_aggregator(config: Config, leaves: Mapping[str, Any], folder: AnyPath) -> Aggregator:
    """The aggregator alone: neither the transformer nor the base is read."""
    aggregator = nnx.eval_shape(lambda: Aggregator(config.aggregator, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(aggregator, nnx.Param))
    variables = {".".join(["aggregator", *map(str, path)]): one for path, one in flat}
    own = {name: leaf for name, leaf in leaves.items() if name.startswith("aggregator.")}
    check_leaves(variables, own, folder)
    for name, variable in variables.items():
        variable.set_value(jnp.asarray(own[name], jnp.float32))
    nnx.update(aggregator, nnx.from_flat_state(flat))
    return aggregator


def _examples(config: Config, features: epath.PathLike | None) -> Iterator[HiddenStates]:
    """Hidden states of the layers that the aggregator reads, one example at a time."""
    reads = config.aggregator.reads
    if features is not None:
        batches = make_dataset(epath.Path(features) / "held_out", batch=1, seed=0, layers=reads)
        for batch in islice(batches, min(EXAMPLES, batches.records)):
            yield jax.tree.map(np.asarray, batch.hidden_states)
        batches.close()
        return
    rows = json.loads((DEMO / "references" / "prompts.json").read_text(encoding="utf-8"))
    reader = FeatureExtractor.of(config).reader
    for row in rows:
        images = [load_image(DEMO / "references" / name) for name in row["image_paths"]]
        states = reader.read([row["prompt"]], [images])
        wanted = jnp.array(reads)
        yield states._replace(text=states.text[:, wanted], image=states.image[:, wanted])


def _modality(aggregator: Aggregator, name: str, examples: Sequence[HiddenStates]) -> LayerUse:
    """Averages over the valid tokens of all examples."""
    pool: LayerPool = aggregator.pools[name if name in aggregator.pools else "shared"]
    graph, state = nnx.split(pool)
    measure = jax.jit(lambda state, x, valid: measure_pool(nnx.merge(graph, state), x, valid))
    attention, norms, tokens = 0.0, 0.0, 0
    for example in examples:
        states, valid = getattr(example, name), getattr(example, f"{name}_mask")
        if not (count := int(np.sum(valid))):
            continue
        maps, lengths = measure(state, jnp.asarray(states, jnp.float32), jnp.asarray(valid))
        attention, norms = attention + np.asarray(maps), norms + np.asarray(lengths)
        tokens += count
    if not tokens:
        raise InputError(f"no example has {name} tokens; give records that have some (--features)")
    weights = np.asarray(pool.projector[...], np.float32)
    shares = np.abs(weights) * norms
    return LayerUse(
        weights.tolist(), (shares / shares.sum()).tolist(), np.asarray(attention / tokens).tolist()
    )


def measure_pool(
    pool: LayerPool, states: Float[Array, "B M L C"], valid: Bool[Array, "B L"]
) -> tuple[Float[Array, "blocks M M"], Float[Array, " M"]]:
    """Attention over layers, averaged over heads, and the norms of what is mixed; both summed over
    valid tokens."""
    batch, layers, length, width = states.shape
    tokens = states.swapaxes(1, 2).reshape(batch * length, layers, width)
    mask = valid.reshape(-1).astype(jnp.float32)

    def apply(block: FusionBlock, x: Array, _: None) -> tuple[Array, Array]:
        q, k, _ = block.project(block.norm1(x))
        scores = jnp.einsum("TQHD,TKHD->THQK", q, k, precision=FLOAT32) * q.shape[-1] ** -0.5
        mixed = jax.nn.softmax(scores.astype(jnp.float32)).mean(axis=1)
        return block(x), jnp.einsum("TQK,T->QK", mixed, mask, precision=FLOAT32)

    attention = jnp.zeros((0, layers, layers))
    if pool.layer_blocks is not None:
        tokens, attention = scan_blocks(pool.layer_blocks, apply, tokens)
    norms = jnp.linalg.norm(tokens.astype(jnp.float32), axis=-1)
    return attention, jnp.einsum("TM,T->M", norms, mask, precision=FLOAT32)


def write_inspection(out: Path, found: Inspection) -> list[Path]:
    """Writes layers.json and, where layers are pooled, layers.png; returns what was written.

    Raises InputError where matplotlib is not installed.
    """
    values = found._asdict() | {"use": {name: use._asdict() for name, use in found.use.items()}}
    written = [out / "layers.json"]
    if found.use:
        _draw(out / "layers.png", found)
        written.append(out / "layers.png")
    write_json(out / "layers.json", values)
    return written


def _draw(path: Path, found: Inspection) -> None:
    """Weights and shares of both modalities above, attention of each block below."""
    from squeeze_jax.evaluation.report import require_matplotlib

    require_matplotlib()
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    blocks = max(len(use.attention) for use in found.use.values())
    figure = Figure(figsize=(10, 3.2 + 4.2 * blocks), layout="constrained", dpi=120)
    axes = figure.subplots(1 + blocks, 2, squeeze=False, height_ratios=[3.2, *[4.2] * blocks])
    for place, (title, field) in enumerate(
        (("learned weight", "weights"), ("share of the pooled vector", "shares"))
    ):
        _bars(axes[0, place], found, title, field)
    for column, (name, use) in enumerate(found.use.items()):
        for block, rows in enumerate(use.attention):
            below = axes[1 + block, column]
            shown = below.imshow(rows, cmap="viridis", vmin=0)
            number = f", block {block + 1}" if blocks > 1 else ""
            below.set(title=f"attention, {name} tokens{number}", xlabel="to layer")
            below.set_ylabel("from layer")
            for axis in (below.xaxis, below.yaxis):
                _label_layers(axis, found.layers)
            figure.colorbar(shown, ax=below, shrink=0.85)
    step = "" if found.step is None else f", step {found.step:,}"
    figure.suptitle(f"{found.checkpoint}: {found.kind}{step}, {found.examples} examples")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda part: figure.savefig(part, format="png"))


def _bars(axes: "Axes", found: Inspection, title: str, field: str) -> None:
    places = np.arange(len(found.layers))
    for number, (name, use) in enumerate(found.use.items()):
        axes.bar(places + 0.4 * (number - 0.5), getattr(use, field), 0.4, label=name)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(title=title, xlabel="layer of the MLLM (0: input embeddings)")
    axes.spines[["top", "right"]].set_visible(False)
    _label_layers(axes.xaxis, found.layers)
    axes.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.02))
    axes.set_ylim(top=1.15 * axes.get_ylim()[1])


def _label_layers(axis: Any, layers: Sequence[int]) -> None:
    """Names every layer where there is room, else every fourth."""
    step = 1 if len(layers) <= 16 else 4
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
