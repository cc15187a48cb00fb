"""Serves the page: who may reach it, how many may wait, what a picture may weigh on its way."""

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager

import gradio as gr  # pyright: ignore[reportMissingImports]  # the extra `app`
from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]

from squeeze_jax.app import page, session, strip
from squeeze_jax.errors import InputError

MAX_WAITING = 16
"""Drawings and uploads that wait at once; one more is refused (our decision)."""
MAX_SESSIONS = 256
"""Browsers that are remembered, at about 0.1 MB each; the oldest are forgotten, and then begin anew
with the page's own τ (our decision; Gradio's default is 10,000)."""

Message = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]


def launch(
    studio: session.AppState, host: str, port: int, auth: tuple[str, str] | None = None
) -> tuple[gr.Blocks, str]:
    """The page in threads of its own, and its address; `auth`: the user and password to ask for.

    Raises InputError where the address cannot be served on.
    """
    blocks = page.build(studio).queue(max_size=MAX_WAITING, api_open=False)
    try:
        _, url, _ = blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,  # IPv6
            server_port=port, auth=auth, prevent_thread_lock=True, quiet=True, footer_links=[],
            share=False, inbrowser=False, ssr_mode=False, pwa=False, mcp_server=False,
            state_session_capacity=MAX_SESSIONS,
            # What is smaller reaches `session`, which says more.
            max_file_size=8 * session.MAX_BYTES,
            theme=page.THEME, css=page.STYLE + strip.STYLE,
            app_kwargs={"lifespan": keep_to_one_site},
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"cannot serve on {host}, port {port} ({error}); choose another --port"
        ) from error
    return blocks, url


@asynccontextmanager
async def keep_to_one_site(app: Starlette) -> AsyncIterator[None]:
    """The lifespan of a Gradio app whose answers other sites may not read.

    Gradio allows every origin, cookies included, when the page is reached by an address that is
    none of localhost's. Within one site a browser asks for no leave, so none is given.
    """
    assert app.middleware_stack is not None  # it runs this lifespan
    app.middleware_stack = without_cors(app.middleware_stack)
    yield


def without_cors(app: AsgiApp) -> AsgiApp:
    """An ASGI app whose answers have no `Access-Control-…` headers."""

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        async def send_bare(message: Message) -> None:
            headers = message.get("headers")
            if isinstance(headers, list):
                message["headers"] = [
                    (name, value)
                    for name, value in headers
                    if not name.lower().startswith(b"access-control-")
                ]
            await send(message)

        await app(scope, receive, send_bare)

    return answer
