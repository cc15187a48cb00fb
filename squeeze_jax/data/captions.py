"""Captions that are longer than the MLLM's limit: cut where a sentence ends."""

import re
from collections.abc import Callable, Sequence

from squeeze_jax.config import Config
from squeeze_jax.data.chat import build_input, load_tokenizer
from squeeze_jax.data.record_writer import Example
from squeeze_jax.data.sources.contract import Examples, captions_of, most_references, parts_of
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import encoder_folder

SENTENCE_END = re.compile(r"[.!?]+[\"')\]”’]*(?=\s)|[。！？]+")


def cut_caption(caption: str, fits: Callable[[str], bool]) -> str:
    """The longest run of whole sentences, from the first on, that fits.

    Returns the caption as it is where it fits, or where not even its first sentence does.
    """
    if fits(caption):
        return caption
    ends = [found.end() for found in SENTENCE_END.finditer(caption)]
    return next((cut for end in reversed(ends) if fits(cut := caption[:end])), caption)


class CutCaptions:
    """Examples whose long captions are cut."""

    def __init__(self, rows: Examples, fits: Callable[[str, int], bool]) -> None:
        """fits: whether a prompt with that many references can be read."""
        self.rows, self.fits = rows, fits
        self.read = self.cut = 0
        """Captions that were read, and those of them that were cut."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        example = self.rows[index]
        whole = [example.prompt, *example.other_captions]
        captions = self._cut(index, whole)
        self.read += len(whole)
        self.cut += sum(one != other for one, other in zip(whole, captions, strict=True))
        return example._replace(prompt=captions[0], other_captions=tuple(captions[1:]))

    def _cut(self, index: int, captions: Sequence[str]) -> list[str]:
        count = self.rows.references(index)
        return [cut_caption(one, lambda caption: self.fits(caption, count)) for one in captions]

    def prompt(self, index: int) -> str:
        """The first caption, cut."""
        return self._cut(index, [self.rows.prompt(index)])[0]

    def other_captions(self, index: int) -> Sequence[str]:
        """Behind the first, `prompt`."""
        return self._cut(index, captions_of(self.rows, index)[1:])

    def references(self, index: int) -> int:
        """How many an example has."""
        return self.rows.references(index)

    def name(self, index: int) -> str:
        """What a message calls it."""
        return self.rows.name(index)

    @property
    def source(self) -> str:
        """The rows' own; that captions are cut is noted beside it."""
        return self.rows.source

    @property
    def prompts_are_valid(self) -> bool:
        return self.rows.prompts_are_valid

    @property
    def parts(self) -> Sequence[int] | None:
        """Those of the rows below."""
        return parts_of(self.rows)

    @property
    def most_references(self) -> int:
        """Of one row below."""
        return most_references(self.rows)


def caption_check(config: Config) -> Callable[[str, int], bool]:
    """Whether a prompt with so many references fits the config's MLLM, by its tokenizer alone."""
    tokenizer = load_tokenizer(encoder_folder(config.model.mllm, "mllm"))
    data = config.data

    def fits(prompt: str, references: int) -> bool:
        try:
            build_input(
                tokenizer,
                prompt,
                [0] * references,
                data.system_text,
                max_text_tokens=data.max_text_tokens,
            )
        except InputError:
            return False
        return True

    return fits
