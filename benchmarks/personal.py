"""What a few pictures of one's own change: a subject of a kind that no training saw, before and after.

    python benchmarks/personal.py [--subjects tractor fire_engine] [--rows 5] [--out runs/personal]

For each vehicle, which the miniature of emoji never saw, `configs/personal.py` goes on from the
shipped weights with a manifest of --rows pictures. Then the vehicle is asked for in 32 other scenes,
from other references, and judged by retrieval among sixteen vehicles, with both weights. Writes
docs/personal.png: a reference, before, after and the true target, four scenes of each.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from squeeze_jax.commands import train
from squeeze_jax.data.record_writer import Example
from squeeze_jax.evaluation.grids import sample_examples
from squeeze_jax.miniature.emoji.pairs import Pair, pair_at
from squeeze_jax.miniature.emoji.scores import judge_all
from squeeze_jax.miniature.emoji.subjects import Subject, subjects_of
from squeeze_jax.miniature.emoji.words import write_prompt
from squeeze_jax.sampling.pipeline import Pipeline, Settings

ROOT = Path(__file__).parents[1]
SCENES, SHOWN, SCALE = 32, 4, 2


def pairs_of(subject: Subject, seed: int, count: int) -> list[Pair]:
    """`count` scenes of one subject, each with another reference of it."""
    pairs = []
    for index in range(count):
        pair = pair_at(seed, index, "held_out_category", complete=True)
        placement = pair.scene.placements[0]._replace(subject=subject, look=0)
        scene = pair.scene._replace(placements=(placement,))
        rng = np.random.default_rng((seed, index))
        prompt = write_prompt(scene, rng, "held_out_category", True)
        pairs.append(pair._replace(scene=scene, prompt=prompt))
    return pairs


def write_manifest(folder: Path, pairs: list[Pair]) -> Path:
    """Pictures and a manifest of theirs, as a user would bring them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, pair in enumerate(pairs):
        pair.references()[0].save(folder / f"reference-{number}.png")
        pair.target().save(folder / f"target-{number}.png")
        rows.append(
            {
                "prompt": pair.prompt.text,
                "image_paths": [f"reference-{number}.png"],
                "image_tgt_path": f"target-{number}.png",
            }
        )
    (folder / "mine.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return folder / "mine.json"


def draw(checkpoint: str, pairs: list[Pair]) -> np.ndarray:
    examples = [Example(p.prompt.text, p.references(), p.target()) for p in pairs]
    return sample_examples(Pipeline.load(checkpoint), examples, Settings())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["tractor", "sailboat", "helicopter"])
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/personal"))
    given = parser.parse_args()
    known = {subject.name.replace(" ", "_"): subject for subject in subjects_of("held_out_category")}
    hits: dict[str, list[bool]] = {"before": [], "after": []}
    sheet = []
    for name in given.subjects:
        folder = given.out / name
        manifest = write_manifest(folder, pairs_of(known[name], 500, given.rows))
        preset = [str(ROOT / "configs" / "personal.py"), "--data.source", str(manifest)]
        if code := train.main([*preset, "--from", "emoji", "--workdir", str(folder / "run")]):
            raise SystemExit(code)
        pairs = pairs_of(known[name], 600, SCENES)
        drawn = {"before": draw("emoji", pairs), "after": draw(str(folder / "run"), pairs)}
        scores = judge_all(drawn, pairs)
        for way, score in scores.items():
            hits[way] += score.hits().tolist()
        shares = ", ".join(f"{way} {100 * s.subject().value:.0f} %" for way, s in scores.items())
        print(f"{name}: right among 16 vehicles {shares} of {SCENES} scenes", flush=True)
        rows = [
            [np.asarray(pair.references()[0]) for pair in pairs[:SHOWN]],
            *(list(pictures[:SHOWN]) for pictures in drawn.values()),
            [np.asarray(pair.target()) for pair in pairs[:SHOWN]],
        ]
        sheet.append(np.concatenate([np.concatenate(row, 1) for row in rows]))
    for way, some in hits.items():
        print(f"{way}: {100 * np.mean(some):.1f} % of {len(some)}")
    whole = Image.fromarray(np.concatenate(sheet, 1))
    whole = whole.resize((SCALE * whole.width, SCALE * whole.height), Image.Resampling.NEAREST)
    whole.save(ROOT / "docs" / "personal.png")


if __name__ == "__main__":
    main()
