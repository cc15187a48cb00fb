"""The section of the configuration that says where examples come from and how large they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from squeeze_jax.config_checks import Checked, above_zero, between

MAX_TEXT_TOKENS = 256
"""Default of `data.max_text_tokens`."""
LongCaptions = Literal["refuse", "cut"]
SOURCE_FIELDS = ("source", "manifest", "critters", "emoji")
"""Fields that each choose a source of examples."""


@dataclass(frozen=True)
class CrittersConfig:
    """The procedural demo data: drawn, not loaded."""

    train: int = 60_000
    """Pairs to draw for training."""
    held_out: int = 512
    """Pairs of subjects that training never sees, for validation and scores."""
    size: int = 64
    """Side of the drawn pictures in pixels."""
    seed: int = 0
    """Decides which pairs are drawn; at least 0."""


@dataclass(frozen=True)
class EmojiConfig(Checked):
    """Pictures of Noto Emoji in drawn scenes: made when they are asked for, at `data.buckets`'
    sizes."""

    train: int = 40_000
    """Examples to draw for training."""
    held_out: int = 512
    """Examples of subjects and in sentences that training never sees, for validation and
    scores."""
    subjects: int = 1
    """Most subjects of an example, 1 or 2; with 2, every second example has two."""
    seed: int = 0
    """Decides all of an example, with its number; from 0."""
    near: float = 0.0
    """Share (0 .. 1) of the training examples with one subject whose reference shows it more or
    less as the target does: at any difference between none and the usual, mostly small ones."""

    def _problems(self) -> Iterator[str]:
        yield from between(1, 2, "data.emoji", self, "subjects")
        yield from between(0, 1, "data.emoji", self, "near")
        yield from above_zero("data.emoji", self, "train", "held_out")


@dataclass(frozen=True)
class DataConfig(Checked):
    """Where examples come from and how large they are."""

    source: str | None = None
    """Pictures and prompts: FILE.json, FILE.jsonl, folder:DIR, subjects200k:DIR, uno1m:DIR or
    webdataset:DIR (docs/data.md); or `critters` or `emoji` below; or ready `features`."""
    manifest: str | None = None
    """`source`, by the name that it had when it was a JSON list always."""
    image_root: str | None = None
    """Folder below which the pictures of a JSON list, JSON lines or an image folder lie, absolute
    paths among them, and where relative ones begin; None: the folder of the list."""
    critters: CrittersConfig | None = None
    emoji: EmojiConfig | None = None
    features: str | None = None
    """Folder of feature records (train and held-out below it); None: extracted into the work
    folder."""
    mix: tuple[tuple[str, float], ...] = ()
    """Several such folders in place of `features`, each with a weight: `--data.mix FOLDER 2
    FOLDER 1`. A step's examples come from them in proportion to the weights, whatever their sizes;
    each folder is gone through in epochs of its own."""
    height: int = 512
    width: int = 512
    """Target size in pixels, multiples of 16 (our decision: 512 x 512)."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Several target sizes (height, width) to train on instead: a target gets the one nearest in
    aspect ratio, and a batch holds one number of target tokens and of references. `height` and
    `width` stay what sampling draws by default."""
    reference_long_side: int = 512
    """References keep their aspect ratio and are at most this long (our decision)."""
    min_score: float | None = None
    """Leaves pairs out that were scored lower, or whose score is unknown: UNO-1M's `score_final` (0
    to 4), each of Subjects200K's three scores (0 to 5). None: 3.5, as UNO-1M's authors advise, and
    5, the usual filter of Subjects200K (our decision). 0 takes all."""
    limit: int | None = None
    """Takes only so many of the first examples that pass; None: all."""
    held_out: int = 16
    """Examples kept for validation, at most a tenth: the last of a list or an image folder, the
    first of the other sources."""
    skip_bad: bool = False
    """Leaves rows out that cannot be used, and lists them, instead of refusing the source."""
    batch_per_chip: int = 1
    """Examples a step on each device; the global batch is this times the mesh's data and fsdp axes
    (devices along the tensor axis share examples)."""
    codec: Literal["bf16", "int8"] = "bf16"
    """How records keep hidden states: `int8` halves them (our decision: docs/data.md has the error
    it makes)."""
    online: bool = False
    """Runs the frozen encoders inside the training program instead of extracting records first:
    more work a step (the MLLM and the autoencoder), nothing on disk. References must all have one
    size after resizing."""
    keep: Literal["all", "read"] = "all"
    """Which hidden states records keep: all of the MLLM's, or only those that this config's
    aggregator reads."""
    extract_batch: int = 8
    """Examples that go through the frozen encoders at once."""
    workers: int = 0
    """Reading processes; 0 reads in threads of the main process."""
    max_text_tokens: int = MAX_TEXT_TOKENS
    """Most text tokens of a prompt with its template (our decision: captions of the public sets
    have 40 to 150 words). Configs and records from before there was a choice have 128."""
    long_captions: LongCaptions = "refuse"
    """What becomes of a longer prompt: its row is refused, or it is cut where a sentence ends."""
    system_text: str | None = None
    """System turn of the MLLM's chat; None leaves it out, as the published `-hf` files do (our
    decision)."""
    max_tiles: int = 1
    """Most tiles of a reference that InternVL sees, 1 to 12 (published option; one tile is our
    decision)."""

    @property
    def tiles_per_reference(self) -> int:
        """Most tiles that the MLLM sees of a reference: the whole picture is one more of
        several."""
        return self.max_tiles + (self.max_tiles > 1)

    def _problems(self) -> Iterator[str]:
        for name in ("height", "width", "reference_long_side"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                why = "(8x autoencoder, 2x2 patches)"
                yield f"data.{name} {value} must be a positive multiple of 16 {why}"
        for height, width in self.buckets:
            if min(height, width) <= 0 or height % 16 or width % 16:
                size = f"{height}x{width}"
                yield f"data.buckets has {size}; both sides must be positive multiples of 16"
        if len(set(self.buckets)) != len(self.buckets):
            yield "data.buckets names a size twice"
        if self.held_out < 1:
            yield f"data.held_out is {self.held_out}; it must be at least 1"
        for name, why in (
            ("features", "it reads no records"),
            ("mix", "it reads no records"),
            ("buckets", "it has one size"),
            ("workers", "it reads in threads"),
        ):
            if self.online and getattr(self, name):
                yield f"data.online and data.{name} are both set; leave one out: on-line, {why}"
        if self.mix and self.features is not None:
            yield "data.mix and data.features are both set; name that folder in data.mix"
        for folder, weight in self.mix:
            if not 0 < weight < inf:
                yield f"data.mix weighs {folder} {weight:g}; a weight must be larger than 0"
        if len({folder for folder, _ in self.mix}) != len(self.mix):
            yield "data.mix names a folder twice; add up its weights"
        chosen = [name for name in SOURCE_FIELDS if getattr(self, name) is not None]
        if len(chosen) > 1:
            both = " and ".join(f"data.{name}" for name in chosen)
            yield f"{both} are both set; choose one source of examples"
        if self.critters is not None:
            if self.buckets:
                sizes = "pictures of several sizes"
                yield f"data.buckets is for {sizes}; data.critters are all drawn at one"
            if self.critters.size != self.height:
                yield (
                    f"data.critters.size {self.critters.size} must equal data.height "
                    f"{self.height}: they are drawn at that size"
                )
        if self.limit is not None and self.limit < 1:
            yield f"data.limit is {self.limit}; it must be at least 1, or None for all"
        if self.long_captions not in get_args(LongCaptions):
            choices = ", ".join(get_args(LongCaptions))
            yield f"data.long_captions is {self.long_captions!r}; choose one of {choices}"
        yield from between(1, 12, "data", self, "max_tiles")
        yield from between(16, 4096, "data", self, "max_text_tokens")
        yield from above_zero("data", self, "batch_per_chip", "extract_batch")
