"""A training run of the tiny system as a program of its own: `tiny_run.py WORKDIR FEATURES
'{"settings": …}'`.

WORKDIR may be gs://bucket/…. Settings: devices, address (HOST:PORT), count, index, steps, mesh,
batch_per_chip, limit (bytes a
file may have), slow (seconds that a step takes at least), seen (file for the records of every
batch), fail (process and batch at which it cannot read a record), back (seconds by which the clock
is set back at every look at it).
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path

features, settings = Path(sys.argv[2]), json.loads(sys.argv[3])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={settings.get('devices', 1)}"
    " --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
)
sys.path.insert(0, str(Path(__file__).parents[1]))


def main():
    from fake_encoders import LAYERS, WIDTH
    from tiny import tiny_config

    from squeeze_jax.checkpoints.manager import Checkpoints
    from squeeze_jax.commands.run import guarded, setup
    from squeeze_jax.config import (
        CheckpointConfig,
        DataConfig,
        LogConfig,
        ParallelConfig,
        StageConfig,
        TrainingConfig,
    )
    from squeeze_jax.data.pipeline import BatchIterator
    from squeeze_jax.errors import InputError
    from squeeze_jax.models.aggregator import AggregatorConfig
    from squeeze_jax.processes import ending_together, init_distributed, is_main
    from squeeze_jax.storage import as_path
    from squeeze_jax.training.loop import train

    setup()
    if "count" in settings:
        init_distributed(settings["address"], settings["count"], settings["index"])
    base = tiny_config()
    config = dataclasses.replace(
        base,
        aggregator=AggregatorConfig(
            layers=tuple(range(LAYERS)),
            width=WIDTH,
            out_width=24,
            heads=2,
            mlp_width=24,
            refiner_blocks=1,
        ),
        data=DataConfig(
            height=32,
            width=32,
            reference_long_side=32,
            batch_per_chip=settings.get("batch_per_chip", 1),
        ),
        training=TrainingConfig(
            stages=(StageConfig(steps=settings.get("steps", 8), references=True),),
            validate_every=4,
            sample_every=0,
        ),
        checkpoint=CheckpointConfig(every=settings.get("every", 2)),
        parallel=ParallelConfig(*settings.get("mesh", (1, -1, 1))),
        log=LogConfig(every=1, tensorboard=False),
    )
    draws = BatchIterator.__next__

    def watched(self):
        batch = draws(self)
        time.sleep(settings.get("slow", 0))
        if settings.get("fail") == [settings.get("index", 0), self._drawn]:
            raise InputError("shard 7: record 3 cannot be read")
        if "seen" in settings and self._workers == 0:
            with Path(settings["seen"]).open("a") as file:
                file.write(json.dumps([self._drawn, batch.index.tolist()]) + "\n")
        return batch

    BatchIterator.__next__ = watched
    if "limit" in settings:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        keep, Checkpoints.save = Checkpoints.save, None

        def save(self, step, *rest):
            if step >= settings["limit"][0]:  # from here on the disk is full
                self.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (settings["limit"][1],) * 2)
            keep(self, step, *rest)

        Checkpoints.save = save

    if "back" in settings:
        looks = itertools.count()
        now = time.time
        time.time = lambda: now() - settings["back"] * next(looks)

    def run():
        say = lambda text: is_main() and print(text, flush=True)  # noqa: E731
        with ending_together():
            result = train(config, as_path(sys.argv[1]), features, say=say)
        if is_main():
            print("validation", result.validation)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
