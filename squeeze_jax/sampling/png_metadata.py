"""The settings of a picture as text inside its PNG: written by `sample` and `app`, read back."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from PIL import Image

from squeeze_jax.array_types import Json
from squeeze_jax.errors import InputError, printable
from squeeze_jax.sampling.schedule import STAGE_NAMES
from squeeze_jax.sampling.settings import Resolved


class Reference(NamedTuple):
    """A reference as it was given: height and width in pixels, not the picture itself."""

    path: str
    height: int
    width: int


@dataclass(frozen=True)
class Embedded:
    """All that it takes, next to the references, to draw a picture again."""

    prompt: str
    references: tuple[Reference, ...]
    checkpoint: str
    checkpoint_step: int | None
    settings: Resolved
    """Of this picture alone: its own seed, one image."""


def text_of(
    prompt: str,
    references: Sequence[Reference],
    checkpoint: str,
    checkpoint_step: int | None,
    settings: Resolved,
    i: int,
    stages: Sequence[str],
) -> Json:
    """The text of image `i` of a run, for `save_png`; `stages` names that of each step.

    The number of steps of each stage is there for whoever looks: `read` takes the settings alone.
    """
    return {
        "prompt": prompt,
        "references": [reference._asdict() for reference in references],
        "checkpoint": checkpoint,
        "checkpoint_step": checkpoint_step,
        **vars(settings),
        "seed": settings.seeds[i],
        "num_images": 1,
        "stages": {name: stages.count(name) for name in STAGE_NAMES},
    }


def read(path: str | Path) -> Embedded:
    """The settings inside a PNG.

    Text is parsed as JSON and checked against the field's type; unknown keys are left alone. Raises
    InputError for a file that is no PNG or has no settings of ours inside.
    """
    path = Path(path)
    text = _png_text(path)
    try:
        hints = get_type_hints(Resolved)
        values = {
            field.name: _checked(
                _parsed(text[field.name], hints[field.name]), hints[field.name], field.name
            )
            for field in fields(Resolved)
            if field.name in text or field.default is MISSING
        }
        kinds = get_type_hints(Reference).items()
        references = tuple(
            Reference(*(_checked(row[name], kind, name) for name, kind in kinds))
            for row in json.loads(text["references"])
        )
        step = _checked(json.loads(text["checkpoint_step"]), int | None, "checkpoint_step")
        # Names may come from anywhere; the page and a terminal show them.
        references = tuple(row._replace(path=printable(row.path)) for row in references)
        settings = replace(Resolved(**values), num_images=1)
        _ = settings.solver_config  # refuses what does not go together
        checkpoint = printable(text["checkpoint"])
        return Embedded(text["prompt"], references, checkpoint, step, settings)
    except KeyError as error:
        raise InputError(
            f"{path.name}: no settings of squeeze_jax inside (no {error.args[0]!r}); "
            "take the PNG as it was saved, since editors and messengers drop the text"
        ) from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path.name}: the settings inside cannot be read ({error})") from None


def _png_text(path: Path) -> dict[str, str]:
    """The text chunks before the pixels, which are not decoded."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            kind, found = image.format, dict(image.info)
    except Exception as error:  # decoders raise many kinds on broken files
        raise InputError(f"{path.name}: cannot be read as a picture; replace the file") from error
    if kind != "PNG":
        raise InputError(
            f"{path.name}: this is {kind}; settings are only inside the PNG that was saved"
        )
    return {str(key): value for key, value in found.items() if isinstance(value, str)}


def _parsed(text: str, kind: Any) -> Any:
    """As `save_png` writes values: strings as they are, all else as JSON."""
    return text if kind is str else json.loads(text)


def _checked(value: Any, kind: Any, name: str) -> Any:
    """The value, if it is of the field's type (a whole number is a float, too; a list, a tuple)."""
    kinds = (kind,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
    for option in kinds:
        if (
            get_origin(option) is tuple
            and isinstance(value, list)
            and len(value) == len(get_args(option))
        ):
            return tuple(
                _checked(item, inner, name) for item, inner in zip(value, get_args(option))
            )
    if type(value) is int and int not in kinds and float in kinds:
        value = float(value)
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        wanted = " or ".join(getattr(option, "__name__", str(option)) for option in kinds)
        raise ValueError(f"{name} {str(value)[:40]!r} is not {wanted}")
    return value
