"""`app`: a page to try a checkpoint on."""

import ipaddress
import os
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import tyro
from etils import epath

from squeeze_jax.commands.parallel import Parallel
from squeeze_jax.commands.run import guarded, setup


@dataclass(frozen=True)
class App:
    """Serves a page for drawing: references, prompt, sliders, live previews. For this machine alone
    by default."""

    checkpoint: epath.Path | None = None
    """Work folder (also gs://bucket/…) or weights folder; none: the shipped miniature."""
    host: str = "127.0.0.1"
    """Address to serve on; 0.0.0.0 is every network of this machine."""
    port: int = 7860
    auth: str | None = None
    """USER:PASSWORD to ask for; who may list this machine's processes sees it, too."""
    merge_lora: bool = True
    """Add a LoRA to the base at loading, rounded once: less memory and work."""
    keep_mllm: bool | None = None
    """Keep the MLLM between prompts; else it is read again for each. None: where it fits."""
    parallel: Parallel = field(default_factory=Parallel)


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        App, args=sys.argv[1:] if arguments is None else arguments, prog="python -m squeeze_jax app"
    )
    return guarded(lambda: run(given))


def run(given: App) -> None:
    from squeeze_jax.errors import InputError

    if not 1 <= given.port <= 65535:
        raise InputError(f"--port {given.port} must be from 1 to 65535")
    auth = None if given.auth is None else user_and_password(given.auth)
    signal.signal(signal.SIGTERM, ended)  # without it the folder below would stay
    with tempfile.TemporaryDirectory(
        prefix="squeeze_jax-"
    ) as folder:  # uploads and pictures: gone with the page
        folder = str(Path(folder).resolve())
        os.environ["GRADIO_TEMP_DIR"], os.environ["GRADIO_ANALYTICS_ENABLED"] = folder, "False"
        # After each event Gradio tabulates all that it remembers, 10,000 by default.
        os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "16"
        try:
            import gradio  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                'the page needs gradio; install it with pip install "squeeze_jax[app]"'
            ) from None
        setup()
        from squeeze_jax.app import server, session
        from squeeze_jax.checkpoints.manager import read_config
        from squeeze_jax.interop.load import checkpoint_folder
        from squeeze_jax.planning.sampler_program import mllm_fits
        from squeeze_jax.sampling.pipeline import Pipeline

        print(f"loading {given.checkpoint or 'the shipped miniature'} …", flush=True)
        checkpoint = checkpoint_folder(given.checkpoint)
        mesh = given.parallel.mesh(checkpoint, 1)
        keep = given.keep_mllm
        if keep is None:
            keep = mllm_fits(read_config(checkpoint), mesh, merge_lora=given.merge_lora)
        if not keep:
            print("the MLLM does not fit beside the transformer: it is read again for each prompt")
        pipeline = Pipeline.load(
            given.checkpoint, mesh, merge_lora=given.merge_lora, keep_mllm=keep
        )
        studio = session.AppState(pipeline, str(given.checkpoint or "demo"), Path(folder))
        blocks, url = server.launch(studio, given.host, given.port, auth)
        if auth is None and not is_local(given.host):
            print(
                f"anyone who reaches {given.host}, port {given.port} can draw and upload pictures; "
                "--auth USER:PASSWORD asks for a password"
            )
        print(f"page: {url} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()


def ended(*_: object) -> NoReturn:
    """What a SIGTERM does."""
    from squeeze_jax.errors import Preempted

    raise Preempted("the page has ended")


def user_and_password(text: str) -> tuple[str, str]:
    """The two halves of `USER:PASSWORD`. Raises InputError, which does not repeat them."""
    from squeeze_jax.errors import InputError

    user, _, password = text.partition(":")
    if not (user.strip() and password):
        raise InputError("--auth is not understood; write USER:PASSWORD, neither of them empty")
    return user.strip(), password


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
