"""`demo-encoders`: trains the miniature's frozen parts, the autoencoder to redraw and the small
MLLM to describe."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from squeeze_jax.commands.run import guarded, setup
from squeeze_jax.miniature.train_autoencoder import AutoencoderTraining
from squeeze_jax.miniature.train_mllm import MLLMTraining


@dataclass(frozen=True)
class DemoEncoders:
    """Trains the miniature's autoencoder and MLLM on drawn critters: about 20 minutes on two CPU
    cores."""

    workdir: Path = Path("runs/demo-encoders")
    """`autoencoder` and `mllm` are written below it; copy them to squeeze_jax/demo to ship them."""
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
    import jax.numpy as jnp
    from PIL import Image

    from squeeze_jax.interop.autoencoder import save_autoencoder
    from squeeze_jax.interop.load import save_internvl
    from squeeze_jax.miniature.train_autoencoder import (
        DEMO_AUTOENCODER,
        critter_pictures,
        measure,
        preview,
        train_autoencoder,
    )
    from squeeze_jax.miniature.train_mllm import demo_config, demo_tokenizer, train_mllm
    from squeeze_jax.training.metrics import progress_bar

    started = time.perf_counter()
    with progress_bar() as bar:
        training = given.autoencoder
        task = bar.add_task("autoencoder", total=training.steps, figures="")
        autoencoder = train_autoencoder(
            DEMO_AUTOENCODER,
            training,
            critter_pictures(training.seed, training.batch, training.size),
            progress=lambda step, values: bar.update(
                task, completed=step, figures=f"PSNR {values['psnr']:.1f} dB"
            ),
        )
        folder = given.workdir / "autoencoder"
        save_autoencoder(autoencoder, folder, dtype=jnp.bfloat16, sample_size=training.size)
        held_out = next(critter_pictures(0, 256, training.size, split="held_out"))
        Image.fromarray(preview(autoencoder, held_out[:12])).save(given.workdir / "autoencoder.png")
        print(
            f"autoencoder: {folder}, held-out PSNR {measure(autoencoder, held_out)['psnr']:.1f} dB"
        )

        tokenizer = demo_tokenizer()
        naming = bar.add_task("mllm's eyes", total=given.mllm.vision_steps, figures="")
        task = bar.add_task("mllm", total=given.mllm.steps, figures="")
        mllm = train_mllm(
            demo_config(tokenizer),
            given.mllm,
            tokenizer,
            vision_progress=lambda step, values: bar.update(
                naming, completed=step, figures=f"factors {values['right']:.2f}"
            ),
            progress=lambda step, values: bar.update(
                task, completed=step, figures=f"answers {values['right']:.2f}"
            ),
        )
        folder = given.workdir / "mllm"
        save_internvl(folder, mllm, jnp.bfloat16)
        tokenizer.save(str(folder / "tokenizer.json"))
        print(f"MLLM: {folder}")
    print(f"done in {time.perf_counter() - started:.0f} s")
