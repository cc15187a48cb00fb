"""The model card of an exported folder."""

import json
from pathlib import Path

from squeeze_jax.array_types import Json
from squeeze_jax.config import Config
from squeeze_jax.config_data import DataConfig
from squeeze_jax.config_json import to_json
from squeeze_jax.interop.exported import LORA, TRANSFORMER, torch_code
from squeeze_jax.interop.formats import format_of
from squeeze_jax.interop.load import SHIPPED
from squeeze_jax.interop.tensors import read_json
from squeeze_jax.models.dit import DiTConfig

PUBLISHER = "black-forest-labs"
READERS = ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3-2B-hf")
APACHE = "Apache-2.0"
DEV, FLUX = "FLUX.1-dev Non-Commercial License", "FLUX Non-Commercial License"
NON_COMMERCIAL = {DEV: "flux-1-dev-non-commercial-license", FLUX: "flux-non-commercial-license"}
"""A licence → its name on the hub."""
PUBLISHED = {
    "FLUX.1-dev": DEV,
    "FLUX.1-Krea-dev": DEV,
    "FLUX.1-Kontext-dev": DEV,
    "FLUX.1-schnell": APACHE,
    "FLUX.2-klein-base-4B": APACHE,
    "FLUX.2-klein-4B": APACHE,
    "FLUX.2-klein-base-9B": FLUX,
    "FLUX.2-klein-9B": FLUX,
    "FLUX.2-dev": FLUX,
}
"""Names of bases on the hub, and their licences (their model cards)."""
DISTILLED = {
    "FLUX.2-klein-base-4B": "FLUX.2-klein-4B",
    "FLUX.2-klein-base-9B": "FLUX.2-klein-9B",
}
"""A base → the model of the same shapes that is distilled from it to 4 steps."""
TOOLS = {"comfyui": "ComfyUI", "kohya": "kohya's sd-scripts", "ai_toolkit": "ai-toolkit"}
"""A LoRA dialect → the tool that it is for."""


def write_card(folder: Path, config: Config, about: Json, report: Json | None) -> None:
    """Writes `README.md`: what it is, how to use it, licences, certificate, scores, config."""
    sections = [
        _front(config),
        _what(folder, config, about),
        _usage(folder, config),
        _licences(folder, config),
        _certificate(report, about),
        _scores(folder),
        f"## Training config\n\n```json\n{to_json(config)}\n```\n",
    ]
    (folder / "README.md").write_text("\n".join(section for section in sections if section))


def published(place: str | None) -> str | None:
    """Which published base a folder of weights is, by the name of a folder on its path.

    None: unknown.
    """
    return next((part for part in Path(place or "").parts if part in PUBLISHED), None)


def hub(place: str | None) -> str:
    """Where users find what a run read from `place`: its name on the hub, or that very place."""
    if (base := published(place)) is not None:
        return f"{PUBLISHER}/{base}"
    readers = {reader.split("/")[1]: reader for reader in READERS}
    return readers.get(Path(place or "").name, str(place))


def _front(config: Config) -> str:
    lines = ["library_name: diffusers", "pipeline_tag: image-to-image"]
    base = published(config.model.dit_weights)
    if base is not None and PUBLISHED[base] in NON_COMMERCIAL:
        lines += [
            "license: other",
            f"license_name: {NON_COMMERCIAL[PUBLISHED[base]]}",
            f"license_link: https://huggingface.co/{PUBLISHER}/{base}/blob/main/LICENSE.md",
        ]
    elif base is not None:
        lines.append(f"license: {PUBLISHED[base].lower()}")
    lines += [f"base_model: {PUBLISHER}/{base}"] if base is not None else []
    lines += ["tags:", "- subject-driven", *(["- lora"] if config.lora is not None else [])]
    return "---\n" + "\n".join(lines) + "\n---\n"


def _what(folder: Path, config: Config, about: Json) -> str:
    step = "" if about["step"] is None else f", step {about['step']}"
    family = format_of(config.model.dit)
    lines = [
        f"# {config.name}: subject-driven generation\n",
        "A prompt and pictures of a subject in, new pictures of that subject out. A multimodal LLM "
        "(InternVL3) reads both;",
        "a Dual Layer Aggregator makes all of its hidden states the context of a "
        f"{family.name} transformer, which also sees the",
        "references' latents; sampling hands over from the one to the other in three stages "
        "(arXiv 2605.26111).",
        f"Trained with squeeze_jax{step}; numbers are {about['dtype']}.\n",
        "| file | is |",
        "|---|---|",
    ]
    lora, model = config.lora, config.model
    if lora is not None:
        alpha = lora.rank if lora.alpha is None else lora.alpha
        kind = f"rank {lora.rank}, alpha {alpha:g}, also in its metadata"
        lines.append(f"| `{LORA}` | LoRA of the transformer ({kind}), for diffusers |")
    for dialect, tool in TOOLS.items():
        if (folder / dialect).is_dir():
            lines.append(f"| `{dialect}/lora.safetensors` | the same LoRA, spelled for {tool} |")
    if (folder / TRANSFORMER).is_dir():
        whole = f"the {'merged' if lora else 'whole'} transformer, a {family.class_name}"
        lines.append(f"| `{TRANSFORMER}/` | {whole} |")
    lines.append("| `aggregator/` | the aggregator |")
    for name, what in (("vae", "the autoencoder"), ("mllm", "the multimodal LLM")):
        if (folder / name).is_dir():
            lines.append(f"| `{name}/` | {what} |")
    files = ", ".join(f"`{module}.py`" for module in torch_code(config.model.dit).modules)
    lines.append(f"| {files} | all the code there is; read it before you run it |")
    about_it = "the training run's config; what the folder belongs to"
    lines.append(f"| `config.json`, `export.json` | {about_it} |")
    text = "\n".join(lines) + "\n"
    if lora is not None and model.dit_weights is not None:
        text += f"\nThe LoRA belongs to the base that the run called `{model.dit_weights}`"
        text += "" if about["base"] is None else f" (fingerprint {about['base']})"
        text += "; on another one it does something else.\n"
    return text


def _usage(folder: Path, config: Config) -> str:
    model, code = config.model, torch_code(config.model.dit)
    needs = {TRANSFORMER: model.dit_weights, "vae": model.autoencoder, "mllm": model.mllm}
    absent = {name: place for name, place in needs.items() if not (folder / name).is_dir()}
    given = [f'{name}="{hub(place)}"' for name, place in absent.items()]
    small = model.dit.width < DiTConfig().width  # float32 costs nothing
    arguments = ", ".join(['"."', *given, *(["torch_dtype=torch.float32"] if small else [])])
    # Measured by benchmarks/export_precision.py on the shipped miniature.
    off = "the miniature's pixels are half a grey level of 255 off on average, single ones 43"
    precision = (
        "This computes in float32, as the run's own sampler does. Without `torch_dtype` it is "
        f"bfloat16: half the memory, and {off}."
        if small
        else "This computes in bfloat16. With `torch_dtype=torch.float32` in `load` it takes twice "
        f"the memory and draws what the certificate compared (in bfloat16 {off})."
    )
    pip = 'torch "diffusers>=0.42" "transformers>=5.4" safetensors accelerate'
    pip += " peft" if config.lora is not None else ""
    text = f"""## Usage

`pip install {pip}`, then, in this folder:

```python
import torch
from PIL import Image
from {code.modules[0]} import {code.pipeline}

pipe = {code.pipeline}.load({arguments})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")  # or pipe.enable_model_cpu_offload()
picture = pipe(
    "{_prompt(config)}",
    [Image.open("subject.png")],
    generator=torch.Generator().manual_seed(0),
)[0]
picture.save("out.png")
```

{precision}

Several references may be given, or none (text only). \
`height`, `width`, `num_inference_steps`, `tau1`, `tau2` and
`guidance_scale` default to the run's own. \
`latents=` takes the noise itself, as packed tokens [images, tokens, channels].
"""
    if config.lora is None:
        return text
    text += f"""
The LoRA alone, in any diffusers pipeline of its base: \
`pipe.load_lora_weights(".", weight_name="{LORA}")`. Without the
aggregator's context it has little to go by.
"""
    distilled = DISTILLED.get(published(model.dit_weights) or "")
    if distilled is not None:
        text += f"""
Adapters that were trained on this base are reported to run on the distilled 4-step model as well.
Try it, promised is nothing: load with `transformer="{PUBLISHER}/{distilled}"`, call with
`num_inference_steps=4, guidance_scale=1.0`.
"""
    return text


def _prompt(config: Config) -> str:
    if config.data.critters is not None:
        return "a big critter jumping on the beach at sunset"
    if config.data.emoji is not None:
        return "a big zebra on the beach at sunset"
    return "the cat on a surfboard"


def _licences(folder: Path, config: Config) -> str:
    def licence(place: str | None) -> str:
        base = published(place)
        if base is None:
            return "that of its publisher; FILL IN"
        if PUBLISHED[base] not in NON_COMMERCIAL:
            return f"{base}'s: {PUBLISHED[base]}"
        link = f"https://huggingface.co/{PUBLISHER}/{base}/blob/main/LICENSE.md"
        name = f"[{PUBLISHED[base]}]({link})"
        return f"{base}'s: {name}, not for commercial use. Accept it on its page first"

    base = licence(config.model.dit_weights)
    if config.lora is not None:
        own = "derived from the base: what its licence says of derivatives holds"
        known = published(config.model.dit_weights)
        if format_of(config.model.dit).name == "FLUX.1":
            own += ", with FLUX.1-dev's no commercial use"
        elif known is not None and PUBLISHED[known] in NON_COMMERCIAL:
            own += f", with {known}'s no commercial use"
    elif config.model.dit_weights is not None:
        own = base
    else:
        own = "Apache-2.0; trained from random weights"
    rows = [
        ("Code (`squeeze_*.py`)", "Apache-2.0"),
        *([("Base transformer", base)] if config.model.dit_weights is not None else []),
        ("LoRA" if config.lora is not None else "Transformer", own),
        ("Aggregator", "the trainer's own; Apache-2.0 unless said otherwise here"),
    ]
    mllm = "InternVL3-2B" if hub(config.model.mllm) == READERS[1] else "InternVL3-8B"
    its = f"that of its publisher ({mllm}: see its model card)"
    for what, theirs, place in (
        ("Autoencoder", licence(config.model.autoencoder), config.model.autoencoder),
        ("Multimodal LLM", its, config.model.mllm),
    ):
        own_part = "Apache-2.0; the miniature's, in this folder"
        rows.append((what, own_part if place in SHIPPED else theirs))
    rows.append(("Training data", _training_data(config.data)))
    lines = [f"| {what} | {licence} |" for what, licence in rows]
    return "## Licences, part by part\n\n| part | licence |\n|---|---|\n" + "\n".join(lines) + "\n"


def _training_data(data: DataConfig) -> str:
    drawn = "drawn by squeeze_jax's own code, Apache-2.0"
    if data.emoji is not None:
        return f"{drawn}, with pictures of Noto Emoji, Apache-2.0, © Google LLC"
    return "not in this folder; FILL IN" if data.critters is None else drawn


def _certificate(report: Json | None, about: Json) -> str:
    if report is None:
        return (
            "## Certificate\n\nThe check was skipped: "
            "nobody has compared these files with the system they come from.\n"
        )
    lines = [f"| {name} | {error:.1e} |" for name, error in report["parts"].items()]
    whole, settings, versions = report["whole"], report["settings"], report["versions"]
    lines.append(f"| whole picture: latents | {whole['latents']:.1e} |")
    off = f"{whole['pixels']:.3%}"
    lines.append(f"| whole picture: values off by more than one grey level | {off} |")
    size, note = f"{settings['height']}x{settings['width']}", ""
    if about["dtype"] != "float32":
        note = f" These files are rounded to {about['dtype']}, which makes most of it."
    return (
        "## Certificate\n\nThese files in PyTorch against the system in JAX, "
        "both computing in float32, on the same noise "
        f"and conditions ({settings['steps']} steps, {size}, {settings['references']} references, "
        f"guidance {settings['cfg_scale']:g}).{note} Digests and settings: `parity.json`.\n\n"
        "| | relative error |\n|---|---|\n"
        + "\n".join(lines)
        + "\n\n"
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + "\n"
    )


def _scores(folder: Path) -> str:
    if not (folder / "scores.json").is_file():
        return ""
    report = read_json(folder / "scores.json")
    rows = [
        (way, {task: share["value"] for task, share in score["tasks"].items()})
        for way, score in dict(report.get("scores", {})).items()
    ]
    if not rows:
        text = json.dumps(report, indent=1, sort_keys=True)
        return f"## Scores\n\n```json\n{text}\n```\n"
    tasks = list(rows[0][1])
    lines = [
        f"| {way} | " + " | ".join(f"{100 * shares[task]:.1f}" for task in tasks) + " |"
        for way, shares in rows
    ]
    head = f"| right, % of {report['pairs']} held-out pairs | " + " | ".join(tasks) + " |\n"
    head += "|" + "---|" * (len(tasks) + 1)
    return f"## Scores\n\n{head}\n" + "\n".join(lines) + "\n"
