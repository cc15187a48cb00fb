"""`demo-encoders`: trains the miniature's frozen parts, the autoencoder to redraw and the small
MLLM to describe."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from squeeze_jax.commands.run import guarded, setup
from squeeze_jax.miniature.train_autoencoder import AutoencoderTraining
from squeeze_jax.miniature.train_mllm import MLLMTraining

if TYPE_CHECKING:
    from squeeze_jax.miniature.world import World
    from squeeze_jax.models.autoencoder import Autoencoder


@dataclass(frozen=True)
class DemoEncoders:
    """Trains the miniature's autoencoder and MLLM: about 20 minutes on two CPU cores for drawn
    critters, some ninety for emoji."""

    workdir: Path = Path("runs/demo-encoders")
    """`autoencoder` and `mllm` are written below it; copy them to squeeze_jax/demo to ship them."""
    world: Literal["critters", "emoji"] = "critters"
    """Whose pictures and sentences."""
    parts: tuple[Literal["autoencoder", "mllm"], ...] = ("autoencoder", "mllm")
    """What is trained."""
    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    mllm: MLLMTraining = field(default_factory=MLLMTraining)


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        DemoEncoders,
        args=sys.argv[1:] if arguments is None else arguments,
        prog="squeeze_jax demo-encoders",
    )
    return guarded(lambda: run(given))


def run(given: DemoEncoders) -> None:
    setup()
    started = time.perf_counter()
    if "autoencoder" in given.parts:
        run_autoencoder(given)
    if "mllm" in given.parts:
        run_mllm(given)
    print(f"done in {time.perf_counter() - started:.0f} s")


def world_of(given: DemoEncoders) -> "World":
    from squeeze_jax.miniature.emoji.world import EMOJI
    from squeeze_jax.miniature.world import CRITTERS

    return EMOJI if given.world == "emoji" else CRITTERS


def run_autoencoder(given: DemoEncoders) -> None:
    import jax.numpy as jnp
    from PIL import Image

    from squeeze_jax.interop.autoencoder import save_autoencoder
    from squeeze_jax.miniature.train_autoencoder import (
        DEMO_AUTOENCODER,
        EMOJI_AUTOENCODER,
        measure,
        pictures_of,
        preview,
        train_autoencoder,
    )
    from squeeze_jax.training.metrics import progress_bar

    training, world = given.autoencoder, world_of(given)
    folder = given.workdir / "autoencoder"
    held_out = next(pictures_of(world, 0, 256, split="held_out"))
    with progress_bar() as bar:
        task = bar.add_task("autoencoder", total=training.steps, figures="")

        def keep(step: int, autoencoder: "Autoencoder") -> None:
            save_autoencoder(autoencoder, folder, dtype=jnp.bfloat16, sample_size=64)
            sheet = preview(autoencoder, held_out[:12])
            Image.fromarray(sheet).save(given.workdir / "autoencoder.png")
            reached = measure(autoencoder, held_out)["psnr"]
            print(f"autoencoder, step {step}: {folder}, held-out PSNR {reached:.1f} dB", flush=True)

        train_autoencoder(
            EMOJI_AUTOENCODER if given.world == "emoji" else DEMO_AUTOENCODER,
            training,
            pictures_of(world, training.seed, training.batch),
            progress=lambda step, values: bar.update(
                task, completed=step, figures=f"PSNR {values['psnr']:.1f} dB"
            ),
            checkpoint=keep,
        )


def run_mllm(given: DemoEncoders) -> None:
    import jax.numpy as jnp

    from squeeze_jax.interop.load import save_internvl
    from squeeze_jax.miniature.train_mllm import (
        answers_right,
        demo_config,
        demo_tokenizer,
        tokenizer_of,
        train_mllm,
    )
    from squeeze_jax.training.metrics import progress_bar

    world, emoji = world_of(given), given.world == "emoji"
    tokenizer = tokenizer_of(world) if emoji else demo_tokenizer()
    with progress_bar() as bar:
        naming = bar.add_task("mllm's eyes", total=given.mllm.vision_steps, figures="")
        task = bar.add_task("mllm", total=given.mllm.steps, figures="")
        mllm = train_mllm(
            demo_config(tokenizer, 24 if emoji else 16),
            given.mllm,
            tokenizer,
            world,
            vision_progress=lambda step, values: bar.update(
                naming, completed=step, figures=f"labels {values['right']:.2f}"
            ),
            progress=lambda step, values: bar.update(
                task, completed=step, figures=f"answers {values['right']:.2f}"
            ),
        )
    folder = given.workdir / "mllm"
    save_internvl(folder, mllm, jnp.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))
    known, unknown = (
        100 * answers_right(mllm, given.mllm, tokenizer, world, split)
        for split in ("train", "held_out")
    )
    print(
        f"MLLM: {folder}, {known:.0f} % of answers' tokens right about subjects of training, "
        f"{unknown:.0f} % about held-out ones"
    )
