"""A run that is killed again and again must end like one that was not.

    python benchmarks/soak.py [--steps 2000] [--kills 20] [--least 3] [--most 12] [--out DIR]

Trains a miniature once in peace, and once with SIGKILL or SIGTERM at random moments (seconds after a life's first step),
starting it again each time. Prints what was lost, and fails unless parameters, moments and average are bit for bit those
of the peaceful run, every epoch held each record once, and SIGTERM was obeyed within 30 seconds.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from squeeze_jax.config import (
    CheckpointConfig,
    Config,
    CrittersConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
)
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.dit import DiTConfig

RECORDS, BATCH = 100, 4


def preset(steps: int) -> Config:
    """At most 0.1 s a step on two cores; saves every 20 steps."""
    return Config(
        name="soak",
        model=ModelConfig(
            dit=DiTConfig(
                in_channels=32, context_width=64, pooled_width=8, heads=2, head_width=32,
                num_double_blocks=1, num_single_blocks=2,
                rope_axes=(8, 12, 12), guidance=False,
            ),
            latent_pixels=4, dtype="float32", frozen_dtype="float32",
        ),
        aggregator=AggregatorConfig(
            layers=tuple(range(5)), width=128, out_width=64, heads=4, mlp_width=64, refiner_blocks=1
        ),
        lora=None,
        data=DataConfig(
            height=64, width=64, reference_long_side=64, batch_per_chip=BATCH,
            critters=CrittersConfig(train=RECORDS, held_out=8),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, ema=0.99),
        training=TrainingConfig(
            stages=(
                StageConfig(steps=steps // 2, references=False),
                StageConfig(steps=steps - steps // 2, references=True),
            ),
            validate_every=500, sample_every=0,
        ),
        sampling=SamplingConfig(steps=3, tau1=0.8, tau2=0.5),
        checkpoint=CheckpointConfig(every=20),
        log=LogConfig(every=1, tensorboard=False),
    )  # fmt: skip


def live(workdir: Path, steps: int) -> int:
    """One life: trains until the end, or until it is killed; notes which records make up every batch."""
    from squeeze_jax.commands.run import guarded, setup
    from squeeze_jax.data.extraction import extract_features
    from squeeze_jax.data.pipeline import BatchIterator
    from squeeze_jax.training.loop import train

    setup()
    config, features = preset(steps), workdir.parent / "features"
    draw = BatchIterator.__next__

    def noted(self: BatchIterator):
        batch = draw(self)
        if self.records != RECORDS:  # held-out ones
            return batch
        with (workdir / "reads.jsonl").open("a") as file:
            file.write(json.dumps([self._drawn, batch.index.tolist()]) + "\n")
        return batch

    def run() -> None:
        extract_features(config, features)
        BatchIterator.__next__ = noted
        train(config, workdir, features)

    workdir.mkdir(parents=True, exist_ok=True)
    return guarded(run)


def start(workdir: Path, steps: int) -> subprocess.Popen[bytes]:
    log = (workdir.parent / f"{workdir.name}.log").open("ab")
    command = [sys.executable, __file__, "--life", str(workdir), "--steps", str(steps)]
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    for row in reversed(rows):
        try:
            return int(json.loads(row)["step"])
        except ValueError:  # cut short just now
            continue
    return 0


def state_of(workdir: Path) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        step = manager.latest_step()
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}


def reads_of(workdir: Path) -> tuple[dict[int, list[int]], int]:
    """The records of every batch, and how many batches were read more than once; raises where they differed."""
    batches: dict[int, list[int]] = {}
    lines = (workdir / "reads.jsonl").read_text().splitlines()
    for line in lines:
        number, records = json.loads(line)
        assert batches.setdefault(number, records) == records, f"batch {number} held other records in another life"
    return batches, len(lines) - len(batches)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--least", type=float, default=3.0, help="seconds of training before a kill, at least")
    parser.add_argument("--most", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--life", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.life:
        return live(given.life, given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    peace, war, dice = given.out / "peace", given.out / "war", random.Random(given.seed)

    began = time.monotonic()
    assert start(peace, given.steps).wait() == 0, f"the peaceful run failed: see {peace}.log"
    print(f"peace: {given.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    lost, obeyed, kills = 0, [], 0
    while True:
        process, before = start(war, given.steps), last_step(war)
        while kills < given.kills and last_step(war) <= before and process.poll() is None:
            time.sleep(0.1)
        if kills < given.kills and process.poll() is None:
            time.sleep(dice.uniform(given.least, given.most))
        if kills == given.kills or process.poll() is not None:
            code = process.wait()
            break
        kind = dice.choice([signal.SIGKILL, signal.SIGTERM])
        asked, reached = time.monotonic(), last_step(war)
        process.send_signal(kind)
        code = process.wait()
        kills += 1
        if kind == signal.SIGTERM:
            obeyed.append(time.monotonic() - asked)
            assert code in (143, 0), f"SIGTERM ended with {code}: see {war}.log"
        saved = max((int(p.name) for p in (war / "checkpoints").iterdir() if p.name.isdigit()), default=0)
        lost += max(0, reached - saved)
        print(f"{kind.name} at step {reached}, saved {saved}", flush=True)
    assert code == 0, f"the last life ended with {code}: see {war}.log"

    mine, theirs = state_of(peace), state_of(war)
    assert mine.keys() == theirs.keys()
    unequal = [name for name in mine if not np.array_equal(mine[name], theirs[name])]
    assert not unequal, f"these differ: {unequal[:5]}"
    (batches, _), (others, again) = reads_of(peace), reads_of(war)
    assert batches == others, "the runs read other records"
    drawn = [record for number in sorted(batches) for record in batches[number]][: given.steps * BATCH]
    for epoch in range(len(drawn) // RECORDS):
        assert Counter(drawn[epoch * RECORDS : (epoch + 1) * RECORDS]) == Counter(range(RECORDS)), f"epoch {epoch}"
    steps = [json.loads(line)["step"] for line in (war / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, given.steps + 1)), "every step stands once in the metrics"
    assert not obeyed or max(obeyed) < 30
    print(
        f"{kills} kills ({len(obeyed)} SIGTERM, obeyed within {max(obeyed, default=0):.1f} s); "
        f"{lost} steps lost and repeated, {again} batches read again; final state of {len(mine)} arrays equal bit for bit; "
        f"{len(drawn) // RECORDS} epochs held each of {RECORDS} records once"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
