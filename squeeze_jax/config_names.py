"""Fields of the configuration that once had another name; files and flags may have either."""

RENAMED = {
    "model.dit.double_blocks": "model.dit.num_double_blocks",
    "model.dit.single_blocks": "model.dit.num_single_blocks",
}
"""Old paths to new ones."""


def current_flag(argument: str) -> str:
    """A command-line argument, `--path.to.field` or `--path.to.field=value` under its new name."""
    flag, equals, value = argument.partition("=")
    path = flag.removeprefix("--").replace("-", "_")
    known = flag.startswith("--") and path in RENAMED
    return f"--{RENAMED[path]}{equals}{value}" if known else argument
