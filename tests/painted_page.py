"""The page over a stand-in for a trained pipeline, as a server (`python -m painted_page --port N`),
and who visits it, over HTTP as a browser would."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import jax.numpy as jnp
import numpy as np
from tiny import tiny_config

from squeeze_jax.app.strip import stages_of_steps
from squeeze_jax.commands import app
from squeeze_jax.sampling.pipeline import Pipeline, Progress, Settings

ROOT = Path(__file__).parents[1]
OWN = Settings()


class Painter(Pipeline):
    """Stands in for a trained pipeline: every picture is one grey, its seed, and grows darker with
    the steps. A prompt that begins with "slowly" takes half a second a step."""

    def __init__(self):
        self.config, self.step, self.asked = tiny_config(), 12, []

    def stream(self, prompt, references=(), settings=OWN, every=1):
        run = self.resolved(settings)
        stages = stages_of_steps(self.config, run, bool(references))
        self.asked.append((prompt, [image.size for image in references]))
        print("begun:", prompt, flush=True)
        for step in sorted({*range(every, run.steps, every), run.steps}):
            time.sleep(0.5 * prompt.startswith("slowly"))
            greys = [(run.seed + i) * step / run.steps for i in range(run.num_images)]
            yield Progress(step, run.steps, stages[step - 1], jnp.asarray(greys)[:, None, None])
        print("painted:", prompt, flush=True)

    def decode(self, tokens, settings=OWN):
        run = self.resolved(settings)
        grey = np.asarray(tokens)[..., None] / 127.5 - 1
        return np.broadcast_to(grey, (len(tokens), run.height, run.width, 3))


class Server:
    """A page that runs: its address, and what its process has said."""

    def __init__(self, url: str, process: subprocess.Popen, log: Path) -> None:
        self.url, self.process, self.log = url, process, log

    def said(self) -> str:
        return self.log.read_text()

    def wait_until_said(self, text: str) -> None:
        wait_until(lambda: text in self.said())


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def served(command: Sequence[str], folder: Path) -> Iterator[Server]:
    """The page while the Python `command` runs; at the end nothing of it is left in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    names["TMPDIR"] = str(folder)
    names["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command, log = [sys.executable, *command, "--port", str(port)], folder / "said"
    with log.open("w") as said:
        process = subprocess.Popen(command, env=names, stdout=said, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}/", process, log)
    try:
        deadline = time.monotonic() + 240
        while "page: http" not in server.said():
            assert process.poll() is None and time.monotonic() < deadline, server.said()
            time.sleep(0.1)
        yield server
        second = subprocess.run(command, env=names, capture_output=True, text=True, check=False)
        assert second.returncode == 2 and "choose another --port" in second.stderr
    finally:
        process.terminate()
        code = process.wait(30)
    assert code == 143 and not list(folder.glob("squeeze_jax-*"))  # uploads and pictures are gone
    assert "Traceback" not in server.said()


class Visitor:
    """One browser's session, without the browser: it uploads, and follows what it has asked for."""

    def __init__(self, url: str, **client) -> None:
        import httpx

        self.http = httpx.Client(base_url=url, timeout=60, **client)
        self.session = uuid4().hex[:11]

    def __enter__(self) -> "Visitor":
        return self

    def __exit__(self, *_) -> None:
        self.http.close()

    def functions(self) -> dict[str, int]:
        """Numbers of what the page calls, by name."""
        config = self.http.get("config").raise_for_status().json()
        return {row["api_name"]: row["id"] for row in config["dependencies"]}

    def upload(self, content: bytes, name: str) -> dict:
        """A file as the page's components hold it once it is uploaded."""
        answer = self.http.post("gradio_api/upload", files={"files": (name, content)})
        path = answer.raise_for_status().json()[0]
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def ask(self, function: str, *data):
        """Puts a call into the queue; httpx's answer."""
        body = {"fn_index": self.functions()[function], "session_hash": self.session, "data": data}
        return self.http.post("gradio_api/queue/join", json=body)

    def follow(self) -> Iterator[dict]:
        """What the server says of the call, to its end; closed early, the visitor is gone."""
        query = {"session_hash": self.session}
        with self.http.stream("GET", "gradio_api/queue/data", params=query) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def call(self, function: str, *data) -> list:
        """What a call puts into the page's components at its end."""
        self.ask(function, *data).raise_for_status()
        *_, last = (said for said in self.follow() if said["msg"] == "process_completed")
        assert last["success"], last
        return last["output"]["data"]

    def ask_to_draw(self, prompt: str, seed: int, steps: int = 4, references: Sequence[dict] = ()):
        gallery = [{"image": file, "caption": None} for file in references]
        return self.ask("run", prompt, gallery, 0.9, 0.5, 1.0, steps, 32, 48, 1, seed)


def main() -> None:
    """The command with the stand-in."""
    Pipeline.load = lambda *given, **options: Painter()
    app.Parallel.mesh = lambda *given: None
    sys.exit(app.main(["--checkpoint", "tiny", "--keep-mllm", "True", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
