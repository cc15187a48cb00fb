"""Do the MLLM's states say which of two references stands on the left?

    python benchmarks/binding.py runs/emoji_multi_subject

Ridge regression on the hidden states of a run's training records of two subjects, text tokens by
mean and maximum, the image tokens of each reference by their mean; every fourth record is left for
the test. Chance is 50 %. Nothing else tells the transformer the places of two references; what a
linear probe of pooled states does not find may still be there token by token.
"""

import argparse
from pathlib import Path

import numpy as np
from etils import epath

from squeeze_jax.checkpoints.manager import read_config
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.miniature.emoji.pairs import pair_at
from squeeze_jax.miniature.emoji.words import FIRST, SECOND

RECORDS, PENALTY = 4_000, 1_000.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    data = read_config(epath.Path(given.run)).data
    emoji = data.emoji
    assert emoji is not None and emoji.subjects == 2, "the run has no pairs of subjects"
    records = FeatureSource(epath.Path(given.run) / "features" / "train")
    states: dict[str, list[np.ndarray]] = {"text": [], "image": []}
    left, numbered = [], []
    for index in range(1, min(len(records), 2 * RECORDS), 2):
        record = records[index]
        pair = pair_at(
            emoji.seed, record.number, subjects=2, sizes=data.buckets, near=emoji.near
        )
        if pair.prompt.text != record.prompt:
            raise SystemExit(f"{given.run}: its records are of an earlier drawing")
        text, image = (np.asarray(x, np.float32) for x in (record.text, record.image))
        states["text"].append(np.concatenate([text.mean(1).ravel(), text.max(1).ravel()]))
        halves = np.split(image, 2, axis=1)  # two references of one size
        states["image"].append(np.concatenate([half.mean(1).ravel() for half in halves]))
        left.append(pair.scene.placements[0].position == "left")
        numbered.append(any(words in record.prompt for words in FIRST + SECOND))
    wanted, by_number = np.where(left, 1.0, -1.0), np.array(numbered)
    test = np.arange(len(wanted)) % 4 == 0
    for name, rows in states.items():
        x = np.stack(rows)
        x = (x - x[~test].mean(0)) / (x[~test].std(0) + 1e-6)
        gram = x[~test].T @ x[~test] + PENALTY * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x[~test].T @ wanted[~test])
        right = (x @ weights > 0) == (wanted > 0)
        shares = [right[test & some].mean() for some in (by_number, ~by_number)]
        print(
            f"{name} states, {test.sum()} records: {100 * shares[0]:.0f} % right where the prompt "
            f"numbers the references, {100 * shares[1]:.0f} % where it names them"
        )


if __name__ == "__main__":
    main()
