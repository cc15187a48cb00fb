"""`squeeze-jax COMMAND`, or `python -m squeeze_jax COMMAND`."""

import sys
from importlib import import_module

COMMANDS = {
    "train": "train a preset, or resume it",
    "sample": "draw pictures from a prompt and references",
    "app": "a page for drawing, on this machine",
    "data": "describe a source of examples",
    "extract": "run the frozen encoders over a source of examples",
    "evaluate": "draw a suite's pictures with a checkpoint, and score them",
    "score": "score pictures that are there, whoever drew them",
    "compare": "training runs side by side, as a page",
    "ablate": "train, draw and tabulate a folder of presets with several seeds",
    "inspect": "how a checkpoint's aggregator uses the MLLM's layers",
    "plan": "what a pod run will need and take",
    "verify": "check a published checkpoint, by name and by number",
    "export": "write a folder for PyTorch: LoRA, aggregator, pipeline, card, certificate",
    "demo-encoders": "train the miniature's autoencoder and MLLM",
}


def main() -> int:
    """Runs the command that the first argument names; its exit code."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: squeeze-jax COMMAND …   (COMMAND --help explains its flags; train --list lists presets)\n")
        print("\n".join(f"  {name:15}{what}" for name, what in COMMANDS.items()))
        return 0 if len(sys.argv) > 1 else 2
    name, *arguments = sys.argv[1:]
    if name not in COMMANDS:
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return import_module(f"squeeze_jax.commands.{name.replace('-', '_')}").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
