"""The table of docs/scaling.md: the 12B stage-2 step, and the sampler, compiled for every topology.

    python benchmarks/plans.py --out plans/
    python benchmarks/plans.py --out plans/ --only klein_v5e_2x2 …   FLUX.2 [klein]

Each plan runs in a process of its own and is kept as JSON in the folder: one that is there is not
made again. Needs the `tpu` extra and no TPU; minutes each.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

TEXT = ("--data.max-text-tokens", "128")
"""Of FLUX.1's rows, which were made when that was the limit."""
BEST = (
    "--mesh",
    "data=4,fsdp=16",
    "--data.batch-per-chip",
    "6",
    "--parallel.remat",
    "save_products",
)
ONE_IMAGE = ("--what", "sample", "--images", "1")
PLANS: dict[str, tuple[str, ...]] = {
    "v4_2x2x4": ("--topology", "v4:2x2x4"),
    "v5e_4x4": ("--topology", "v5e:4x4"),
    "v5e_8x8": ("--topology", "v5e:8x8"),
    "v5p_2x2x1": ("--topology", "v5p:2x2x1"),
    "v5p_2x2x1_slices2": ("--topology", "v5p:2x2x1", "--slices", "2", "--mesh", "data=2,fsdp=4"),
    "v5p_2x2x2": ("--topology", "v5p:2x2x2"),
    "v5p_4x4x4": ("--topology", "v5p:4x4x4"),
    "v5p_4x4x4_mfu": ("--topology", "v5p:4x4x4", *BEST),
    "v6e_4x4": ("--topology", "v6e:4x4"),
    "v5p_2x2x1_sample": ("--topology", "v5p:2x2x1", "--what", "sample"),
    "v6e_2x2_sample": ("--topology", "v6e:2x2", *ONE_IMAGE, "--mesh", "fsdp=1,tensor=4"),
    "v5e_2x2_sample": ("--topology", "v5e:2x2", *ONE_IMAGE, "--mesh", "fsdp=1,tensor=4"),
    "v5e_4x4_sample": ("--topology", "v5e:4x4", *ONE_IMAGE, "--mesh", "fsdp=2,tensor=8"),
}
PRODUCTS = ("--parallel.remat", "save_products", "--data.batch-per-chip")
EVERYTHING = ("--parallel.remat", "none", "--data.batch-per-chip")
SMALL_KLEIN: dict[str, tuple[str, ...]] = {
    "klein_v5e_2x2": ("--topology", "v5e:2x2"),
    "klein_v5e_2x2_online": ("--topology", "v5e:2x2", "--data.online"),
    "klein_v5e_2x2_best": ("--topology", "v5e:2x2", *PRODUCTS, "1"),
    "klein_v5e_4x4_best": ("--topology", "v5e:4x4", *PRODUCTS, "2"),
    "klein_v6e_1x1": ("--topology", "v6e:1x1"),
    "klein_v6e_1x1_products": ("--topology", "v6e:1x1", *PRODUCTS, "1"),
    "klein_v6e_1x1_products_2": ("--topology", "v6e:1x1", *PRODUCTS, "2"),
    "klein_v6e_1x1_int8": ("--topology", "v6e:1x1", *PRODUCTS, "2", "--model.frozen-dtype", "int8"),
    "klein_v6e_2x2_best": ("--topology", "v6e:2x2", *PRODUCTS, "3"),
    "klein_v6e_2x2_none": ("--topology", "v6e:2x2", *EVERYTHING, "3"),
    "klein_v5p_2x2x1_best": ("--topology", "v5p:2x2x1", *PRODUCTS, "8"),
    "klein_v5e_2x2_sample": ("--topology", "v5e:2x2", *ONE_IMAGE, "--mesh", "fsdp=1,tensor=4"),
    "klein_v5e_1x1_sample": ("--topology", "v5e:1x1", *ONE_IMAGE),
}
"""FLUX.2 [klein] with InternVL3-2B, at the preset's own limit of 256 text tokens."""
KLEIN: dict[str, tuple[str, ...]] = {
    "klein_8b_v5e_4x4": ("--topology", "v5e:4x4"),
    "klein_8b_v5p_2x2x2": ("--topology", "v5p:2x2x2"),
}
"""FLUX.2 [klein] with InternVL3-8B, at the preset's own limit, too."""
TABLES = (
    ("configs/flux_stage2.py", PLANS, TEXT),
    ("configs/klein_small_stage2.py", SMALL_KLEIN, ()),
    ("configs/klein_stage2.py", KLEIN, ()),
)
ASKED = {
    name: (preset, *flags, *more) for preset, plans, more in TABLES for name, flags in plans.items()
}
"""What `plan` is asked for each row."""
COLUMNS = (
    "topology", "mesh", "batch a chip", "remat", "HBM a chip, GiB (arguments + temporaries)",
    "over ICI, GB", "over DCN, GB", "model TFLOP", "predicted s", "MFU, %", "examples/s",
    "chip-hours of 25,000 + 10,000 steps", "compiled in, s",
)  # fmt: skip
GIB = 2**30


def row(report: dict) -> tuple[str, ...]:
    """A report's cells; what is sent is a chip's own, a step."""
    memory = report["hbm_per_chip"]
    slices = f"{report['slices']} x " if report["slices"] > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    if "collectives" not in report:  # the compiler refused it
        total = f"{memory['total'] / GIB:.2f} of {report['hbm_capacity'] / GIB:.0f}: does not fit"
        what = (str(report["batch_per_chip"]), report["remat"], total)
        return (report["topology"].replace(":", " "), mesh, *what, *("–",) * (len(COLUMNS) - 5))
    sent = {
        over: sum(one["bytes_per_chip"] for one in report["collectives"] if one["over"] == over)
        for over in ("ici", "dcn")
    }
    hours = report.get("chip_hours_25000_10000_steps")
    images = report["examples_per_step"] / report["chips"]
    return (
        f"{slices}{report['topology'].replace(':', ' ')}",
        mesh,
        f"{images:g}",
        report["remat"] if report["what"] == "train" else "– (sampler)",
        f"{memory['total'] / GIB:.1f} of {report['hbm_capacity'] / GIB:.0f} "
        f"({memory['arguments'] / GIB:.1f} + {memory['temporaries'] / GIB:.1f})",
        f"{sent['ici'] / 1e9:.1f}",
        f"{sent['dcn'] / 1e9:.1f}" if sent["dcn"] else "–",
        f"{report['model_flops_per_step'] / 1e12:,.0f}",
        f"{report['predicted_step_seconds']:.2f}",
        f"{100 * report['predicted_mfu']:.0f}",
        f"{report['examples_per_second']:.1f}",
        f"{hours:,.0f}" if hours else "–",
        f"{report['compile_seconds']:.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("plans"), help="folder of the reports")
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(PLANS),
        choices=list(ASKED),
        help="which plans to make",
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name in given.only:
        path = given.out / f"{name}.json"
        if not path.exists():
            command = [sys.executable, "-m", "squeeze_jax", "plan", *ASKED[name], "--json", path]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print("| " + " | ".join(row(json.loads(path.read_text()))) + " |", flush=True)


if __name__ == "__main__":
    main()
