"""docs/training.md: its commands run as they stand, over made-up sets in the published formats.

The presets are the real ones with small sizes and few steps; the folders that the page downloads
are written here. Nothing else is replaced.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from miniature_preset import ROOT, environment
from public_sets import (
    picture,
    subjects_row,
    uno_row,
    write_subjects,
    write_uno,
)
from small_dit import CONFIG as FLUX1
from small_run import write_home
from tiny_judges import save_clip, save_dino, save_dreambench

from squeeze_jax.data.images import load_image
from squeeze_jax.models.flux2 import Flux2Config

NOT_OURS = ("pip", "hf", "git")
FLUX2 = Flux2Config(
    in_channels=64, context_width=40, heads=2, head_width=32, num_double_blocks=1,
    num_single_blocks=2, mlp_ratio=2.5, rope_axes=(6, 8, 8, 10),
)  # fmt: skip
PRESET = """
from dataclasses import replace
from squeeze_jax.config import *
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.data.images import load_image
from squeeze_jax.models.flux2 import Flux2Config

real = load_preset({real!r})
config = replace(
    real,
    model=replace(real.model, dit={dit!r}, dit_weights="home/base", autoencoder="home/vae",
                  mllm="home/mllm", dtype="float32"),
    aggregator=replace(real.aggregator, layers=(0, 1, 3), width=48, out_width=40, heads=4,
                       mlp_width=40, refiner_blocks=1),
    lora=replace(real.lora, rank=3, alpha=3.0),
    data=replace(real.data, height=64, width=64, reference_long_side=32),
    training=TrainingConfig(
        stages=tuple(replace(stage, steps=2) for stage in real.training.stages)
    ),
    sampling=replace(real.sampling, steps=2),
    log=replace(real.log, tensorboard=False),
)
"""
DRIVER = """
import json, sys
from pathlib import Path
import squeeze_jax.__main__ as commands
from squeeze_jax.commands import sample, train

for words in json.loads(Path("commands.json").read_text()):
    print("$", *words, flush=True)
    if words[:3] == ["python", "-m", "squeeze_jax"]:
        sys.argv = words[2:]
        code = commands.main()
    else:
        code = {"train.py": train, "sample.py": sample}[words[1]].main(words[2:])
    if code:
        sys.exit(f"exit code {code}: {' '.join(words)}")
"""


def page_commands():
    """Every command of the page, in order, as words."""
    blocks = re.findall(
        r"^```\n(.*?)^```$", (ROOT / "docs" / "training.md").read_text(), re.M | re.S
    )
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def test_the_page_names_everything_from_data_to_export():
    words = [" ".join(one) for one in page_commands()]
    for part in (
        "data describe subjects200k:", "data describe uno1m:", "extract subjects200k:",
        "extract uno1m:", "train.py configs/klein_stage1.py", "train.py configs/klein_stage2.py",
        "klein_multi_subject.py", "evaluate --suite dreambench", "compare", "ablate", "inspect",
        "export", "sample.py", "plan",
    ):  # fmt: skip
        assert any(part in line for line in words), part
    for word in {word for one in page_commands() for word in one if word.startswith("configs/")}:
        assert (ROOT / word).exists()
        assert (ROOT / word.replace("klein", "flux")).exists()
    pages = re.findall(r"\]\(([a-z]+\.md)", (ROOT / "docs" / "training.md").read_text())
    assert all((ROOT / "docs" / page).is_file() for page in pages)


def write_world(folder, family):
    """All that the page downloads, and the presets, small."""
    write_home(folder / "home", FLUX2 if family == "klein" else FLUX1)
    captions = {"left": "a mug {} on a table. It is white.", "right": "a mug {} by a window"}
    rows = [subjects_row(i, **captions) for i in range(6)] + [
        subjects_row(6, (5, 4, 5)),
        subjects_row(7, None),
    ]
    write_subjects(folder / "subjects", [rows[:4], rows[4:]])
    rows = [uno_row(1, i) for i in range(6)] + [uno_row(1, 6, 3.0), uno_row(1, 7, 131184.67)]
    write_uno(folder / "uno", {1: rows}, order=lambda names: names.sort(reverse=True))
    lines = []
    for i in range(4):
        for other in range(3):
            (folder / f"{i}_{other}.png").write_bytes(picture(i, other))
        references = [f"{i}_1.png", f"{i}_2.png"]
        lines.append(
            {
                "prompt": ["two mugs", f"mugs {i}"],
                "image_paths": references,
                "image_tgt_path": f"{i}_0.png",
            }
        )
    (folder / "several.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "mug.png").write_bytes(picture(1))
    save_dino(folder / "dino-vits16")
    save_clip(folder / "clip-vit-base-patch32")
    save_dreambench(folder / "dreambench")
    names = [f"{family}_{part}" for part in ("stage1", "stage2", "multi_subject")]
    ablations = ["ablations/lap", "ablations/tau_0_0"] if family == "flux" else []
    (folder / "configs" / "ablations").mkdir(parents=True)
    for name in names + ablations:
        real = str(ROOT / "configs" / f"{name}.py")
        text = PRESET.format(real=real, dit=FLUX2 if family == "klein" else FLUX1)
        (folder / "configs" / f"{name}.py").write_text(text)


@pytest.mark.slow
@pytest.mark.telling
@pytest.mark.parametrize("family", ["klein", "flux"])
def test_the_commands_run(tmp_path, family):
    for needed in ("matplotlib", "pyarrow", "diffusers", "peft"):
        pytest.importorskip(needed)
    write_world(tmp_path, family)
    words = [[word.replace("klein", family) for word in one] for one in page_commands()]
    # `plan` needs a TPU's compiler, which its own tests ask; ablations are FLUX.1's.
    skipped = {"plan"} | ({"ablate"} if family == "klein" else set())
    mine = [one for one in words if one[0] not in NOT_OURS and not skipped & set(one)]
    assert len(mine) == len(words) - sum(one[0] in NOT_OURS for one in words) - len(skipped)
    (tmp_path / "commands.json").write_text(json.dumps(mine))
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "driver.py"], cwd=tmp_path, env=environment(tmp_path / "cache"), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for page in (
        "runs/stage2/evaluation/dreambench",
        "runs/multi/evaluation/dreambench",
        "comparison",
    ):
        assert (tmp_path / page / "report.html").is_file()
        assert json.loads((tmp_path / page / "scores.json").read_text())
    compared = json.loads((tmp_path / "comparison" / "scores.json").read_text())["runs"]
    assert {"DINO-I all", "CLIP-I all", "CLIP-T"} <= set(compared["stage2"]["scores"])
    metadata = json.loads((tmp_path / "records" / "several" / "train" / "squeeze.json").read_text())
    assert metadata["summary"]["captions"] == [2] * 3, "three rows train, one validates"
    for shown in ("subjects.png", "mug_beach.png", "runs/stage2/inspection/layers.png"):
        assert load_image(tmp_path / shown).size[0] > 0
    assert json.loads((tmp_path / "exported" / "parity.json").read_text())
    if family == "flux":
        values = json.loads((tmp_path / "runs" / "ablations" / "scores.json").read_text())
        assert values["presets"] == ["lap", "tau_0_0"]
        assert len(values["runs"]) == 2
        ablations = tmp_path / "runs" / "ablations"
        assert (ablations / "lap" / "seed-0" / "checkpoints").is_dir()
        assert not (ablations / "tau_0_0" / "seed-0" / "checkpoints").exists(), "stage 2's weights"
        assert not (tmp_path / "runs" / "stage2" / "trained.json").exists(), "which stays as it was"


def test_the_driver_is_the_command_line():
    """What the test calls is what `python train.py` and `python sample.py` do."""
    for name in ("train", "sample"):
        text = Path(ROOT / f"{name}.py").read_text()
        assert f"from squeeze_jax.commands.{name} import main" in text
