"""Google Cloud Storage's interface served on this machine by the package gcp-storage-emulator, and
what a bucket held after each write."""

import copy
import logging
import os
import socketserver
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

import gcsfs
from etils.epath import backend
from gcp_storage_emulator import server as emulator

BUCKET = "bucket"


class Handler(emulator.RequestHandler):
    """The package's, with the generations that TensorStore asks for: each object says its own, and
    a request on the condition of one is refused where another is there."""

    def generation(self):
        """The object's that is asked for or written; 0 where there is none."""
        url = urlsplit(self.path)
        written = parse_qs(url.query).get("name")
        name = written[0] if written else unquote(url.path.partition("/o/")[2])
        return int(self.storage.objects.get(BUCKET, {}).get(name, {}).get("generation", 0))

    def refused(self):
        query, found = parse_qs(urlsplit(self.path).query), str(self.generation())
        wanted, known = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
        if wanted in (None, [found]) and known != [found]:
            return False
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(304 if self.command == "GET" and known == [found] else 412)
        self.end_headers()
        return True

    def do_GET(self):  # noqa: N802
        if not self.refused():
            super().do_GET()

    def do_POST(self):  # noqa: N802
        if not self.refused():
            super().do_POST()

    def do_DELETE(self):  # noqa: N802
        if not self.refused():
            super().do_DELETE()

    def end_headers(self):
        if self.command == "GET" and (generation := self.generation()):
            self.send_header("x-goog-generation", str(generation))
        super().end_headers()


class ObjectStore:
    """A bucket behind a server of its own; `writes` are all objects that were made or removed."""

    def __init__(self, server):
        self.address = f"http://localhost:{server._api._httpd.server_address[1]}"
        self.storage = server._storage
        self.writes = []
        """(name, content, what the server noted of it), None for the last two where removed."""
        self.watch = lambda count: None
        """Called with the number of writes after each."""
        create, delete = self.storage.create_file, self.storage.delete_file

        def create_file(bucket, name, content, about, *rest):
            create(bucket, name, content, about, *rest)
            self._note(name, content, copy.deepcopy(about))

        def delete_file(bucket, name):
            delete(bucket, name)
            self._note(name, None, None)

        self._create, self._delete = create, delete
        self.storage.create_file, self.storage.delete_file = create_file, delete_file

    def _note(self, *write):
        self.writes.append(write)
        self.watch(len(self.writes))

    def show(self, writes):
        """Lets the bucket hold what was there after these writes."""
        for name in list(self.storage.objects.get(BUCKET, {})):
            self._delete(BUCKET, name)
        held = {}
        for name, content, about in writes:
            held.pop(name, None)
            if content is not None:
                held[name] = content, about
        for name, (content, about) in held.items():
            self._create(BUCKET, name, content, copy.deepcopy(about))

    def names(self, under):
        """Of the objects whose names begin so."""
        held = self.storage.objects.get(BUCKET, {})
        return sorted(name for name in held if name.startswith(under))

    @property
    def environment(self):
        """How gcsfs, TensorStore and ArrayRecord find the server."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "NO_GCE_CHECK": "true",
        }


@contextmanager
def serve():
    """An empty bucket; this process's libraries go there as long as it is served."""
    for name in ("gcp_storage_emulator", "gcsfs"):  # gcsfs would like to know the bucket's kind
        logging.getLogger(name).setLevel(logging.CRITICAL)
    emulator.RequestHandler, handler = Handler, emulator.RequestHandler
    # A client that has read enough hangs up; that is no news.
    told = socketserver.BaseServer.handle_error
    socketserver.BaseServer.handle_error = lambda *_: None
    made = emulator.create_server("localhost", 0, in_memory=True, default_bucket=BUCKET)
    made.start()
    store, before = ObjectStore(made), dict(os.environ)
    os.environ |= store.environment
    _forget_clients()
    try:
        yield store
    finally:
        made.stop()
        emulator.RequestHandler, socketserver.BaseServer.handle_error = handler, told
        for name in store.environment:
            os.environ.pop(name)
        os.environ |= before
        _forget_clients()


def _forget_clients():
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
