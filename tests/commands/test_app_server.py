"""The page as a server, asked over HTTP as browsers ask it: several people at once, people who
leave, how many may wait, what is taken for a picture, who may come in."""

import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from painted_page import Visitor, served
from PIL import Image

from squeeze_jax.commands import app
from squeeze_jax.errors import InputError
from squeeze_jax.sampling import png_metadata as embedded

pytest.importorskip("gradio")
PAINTED = ("-m", "painted_page")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(PAINTED, tmp_path_factory.mktemp("page")) as server:
        assert "anyone who reaches" not in server.said()
        yield server


@pytest.fixture
def visitor(server):
    with Visitor(server.url) as visitor:
        yield visitor


def encoded(picture=None, kind="PNG"):
    file = io.BytesIO()
    (picture or Image.new("RGB", (40, 24), "red")).save(file, kind)
    return file.getvalue()


def shown(gallery):
    """Paths of a gallery's pictures."""
    return [item.get("image", item.get("video"))["path"] for item in gallery]


# Several people


def test_people_who_draw_at_once_each_get_their_own(server, tmp_path):
    found, trouble = {}, []

    def draw(name, seed):
        try:
            with Visitor(server.url) as visitor:
                reference = visitor.upload(encoded(), f"{name}.png")
                for turn in range(3):
                    wanted = f"{name} {turn}", seed + turn
                    visitor.ask_to_draw(*wanted, references=[reference]).raise_for_status()
                    *_, last = (m for m in visitor.follow() if m["msg"] == "process_completed")
                    (path,) = shown(last["output"]["data"][0]["value"])
                    picture = visitor.http.get(f"gradio_api/file={path}").raise_for_status()
                    found[wanted] = picture.content
        except BaseException as error:
            trouble.append(error)

    people = {"ann": 40, "bob": 90, "cem": 150}
    threads = [threading.Thread(target=draw, args=each) for each in people.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not trouble and len(found) == 9
    for (prompt, seed), content in found.items():
        (tmp_path / "a.png").write_bytes(content)
        picture = embedded.read(tmp_path / "a.png")
        assert (picture.prompt, picture.settings.seed) == (prompt, seed)
        assert [r.path for r in picture.references] == [f"{prompt.split()[0]}.png"]
        assert np.all(np.asarray(Image.open(io.BytesIO(content))) == seed)


def test_who_leaves_stops_their_drawing_and_the_next_is_served(server, visitor):
    with Visitor(server.url) as leaves, Visitor(server.url) as waits:
        leaves.ask_to_draw("slowly, for one who leaves", 1, steps=100).raise_for_status()
        stream = leaves.follow()
        while "Step 9 of 100" not in str(next(stream)):
            pass
        waits.ask_to_draw("for one who waits no longer", 2).raise_for_status()
        waiting = waits.follow()
        assert next(waiting)["msg"] == "estimation"
        waiting.close()
        stream.close()
    visitor.ask_to_draw("for one who stays", 3).raise_for_status()
    *_, last = (m for m in visitor.follow() if m["msg"] == "process_completed")
    assert last["success"] and "seed 3" in str(last["output"])
    # One is drawn at a time, so the first drawing has ended by now: before its last step.
    assert "begun: slowly, for one who leaves" in server.said()
    assert "painted: slowly, for one who leaves" not in server.said()
    assert "begun: for one who waits no longer" not in server.said()


def test_too_many_who_wait_are_refused_and_nobody_afterwards(server, visitor):
    from squeeze_jax.app.server import MAX_WAITING

    with Visitor(server.url) as draws, Visitor(server.url) as crowd:
        draws.ask_to_draw("slowly, before a crowd", 1, steps=100).raise_for_status()
        server.wait_until_said("begun: slowly, before a crowd")
        for seed in range(MAX_WAITING):
            assert crowd.ask_to_draw("in a crowd", seed).status_code == 200
        refused = crowd.ask_to_draw("one too many", 99)
        assert refused.status_code == 503 and "Queue is full" in refused.text
        for one in (crowd, draws):
            stream = one.follow()
            next(stream)
            stream.close()
    visitor.ask_to_draw("after the crowd", 3).raise_for_status()
    assert "seed 3" in str(list(visitor.follow()))
    assert "begun: one too many" not in server.said()


# Uploads


def empty_png(side):
    """A PNG that says side × side pixels and holds none: only who decodes it can miss them."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["notes.txt", "film.mp4", "drawing.svg", "no-ending"])
def test_a_picture_is_one_whatever_its_name(visitor, name):
    file = visitor.upload(encoded(), name)
    kind = "video" if name.endswith(".mp4") else "image"  # as the browser tells them apart
    gallery, about = visitor.call("take", [{kind: file, "caption": None}])
    (path,) = shown(gallery)
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    assert gallery[0]["caption"] == name and not about["visible"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cat.png", b"hello", "cat.png: not a picture"),
        ("cat.jpg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cat.jpg: not a picture"),
        ("vast.png", empty_png(60_000), "vast.png: more than the limit of 50000000 pixels"),
        ("large.png", empty_png(8_000), "large.png: 8000x8000 pixels are more than the limit"),
    ],
)
def test_what_is_no_picture_is_one_sentence_whatever_its_name(visitor, name, content, words):
    file = visitor.upload(content, name)
    gallery, about = visitor.call("take", [{"image": file, "caption": None}])
    assert gallery == [] and words in about["value"]
    assert "<br>" not in about["value"] and "/" not in about["value"].split(words)[0].split(">")[-1]
    # Nor does a page that was made by hand get it drawn.
    visitor.ask_to_draw("from what is no picture", 1, references=[file]).raise_for_status()
    assert words in str(list(visitor.follow())[-2]["output"])


def test_settings_come_back_from_a_picture_whatever_its_name(visitor):
    visitor.ask_to_draw("a picture to rename", 7).raise_for_status()
    *_, last = (m for m in visitor.follow() if m["msg"] == "process_completed")
    (path,) = shown(last["output"]["data"][0]["value"])
    content = visitor.http.get(f"gradio_api/file={path}").content
    prompt, *_, said = visitor.call("bring_back", visitor.upload(content, "renamed.txt"))
    assert prompt == "a picture to rename" and "Settings restored." in said["value"]
    *_, said = visitor.call("bring_back", visitor.upload(b"hello", "text.png"))
    assert "text.png: cannot be read as a picture" in said["value"]


# Who may come in


def permissions(answer):
    return [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "[::1]:7860", "192.0.2.7:7860", "pod:7860"])
@pytest.mark.parametrize("origin", ["https://elsewhere.example", "http://127.0.0.1:1234", "null"])
def test_no_other_site_may_read_what_the_page_answers(visitor, host, origin):
    """By whatever address the page is reached; nor may a form of another site draw."""
    headers = {"Host": host, "Origin": origin}
    answer = visitor.http.get("config", headers=headers)
    assert answer.status_code == 200 and not permissions(answer)
    asks = headers | {"Access-Control-Request-Method": "POST"}
    assert not permissions(visitor.http.options("gradio_api/queue/join", headers=asks))
    plain = headers | {"Content-Type": "text/plain"}  # what a browser sends without asking
    body = '{"fn_index": 1, "data": [], "session_hash": "another-site"}'
    answer = visitor.http.post("gradio_api/queue/join", content=body, headers=plain)
    assert answer.status_code == 422 and not permissions(answer)


def test_with_a_password_nothing_is_done_without_it(tmp_path):
    with served((*PAINTED, "--host", "0.0.0.0", "--auth", "ann:pass:wörd"), tmp_path) as server:
        assert "anyone who reaches" not in server.said() and "wörd" not in server.said()
        with Visitor(server.url) as stranger, Visitor(server.url) as ann:
            assert "auth_required" in stranger.http.get("").text
            assert "components" not in stranger.http.get("config").text
            body = {"fn_index": 2, "session_hash": "stranger", "data": []}
            for answer in (
                stranger.http.get("config"),
                stranger.http.post("gradio_api/queue/join", json=body),
                stranger.http.get("gradio_api/queue/data", params={"session_hash": "stranger"}),
                stranger.http.post("gradio_api/upload", files={"files": ("a.png", encoded())}),
                stranger.http.get(f"gradio_api/file={tmp_path}/said"),
            ):
                assert answer.status_code == 401, answer.url
            wrong = {"username": "ann", "password": "pass"}
            assert stranger.http.post("login", data=wrong).status_code == 400
            assert stranger.http.get("config").status_code == 401
            right = {"username": "ann", "password": "pass:wörd"}
            assert ann.http.post("login", data=right).status_code == 200
            ann.ask_to_draw("for ann", 5).raise_for_status()
            assert "seed 5" in str(list(ann.follow()))


def test_a_page_for_everyone_without_a_password_says_so(tmp_path):
    with served((*PAINTED, "--host", "0.0.0.0"), tmp_path) as server:
        (said,) = (line for line in server.said().splitlines() if "anyone" in line)
    assert "--auth USER:PASSWORD asks for a password" in said


@pytest.mark.parametrize("text", ["", "secret", ":secret", "secret:", " :secret"])
def test_a_half_of_a_password_is_refused_and_not_repeated(text, capsys):
    with pytest.raises(InputError, match="write USER:PASSWORD"):
        app.user_and_password(text)
    assert app.main(["--auth", text]) == 2
    said = capsys.readouterr().err
    assert "write USER:PASSWORD" in said and "secret" not in said and said.count("\n") == 1


# For days


def resident_megabytes(process):
    """Of a process, as Linux counts them."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.telling
@pytest.mark.slow
def test_a_hundred_drawings_leave_memory_as_it_was(tmp_path):
    """With the shipped weights. Who keeps a drawing's 16 previews keeps 39 MB of the last 50."""
    with served(("-m", "squeeze_jax", "app"), tmp_path) as server:
        used = []
        for number in range(100):
            with Visitor(server.url) as visitor:
                file = visitor.upload(encoded(), f"{number}.png")
                gallery, _ = visitor.call("take", [{"image": file, "caption": None}])
                settings = 0.9, 0.5, 1.0, 4, 128, 128, 4, number
                visitor.ask("run", f"critter {number}", gallery, *settings).raise_for_status()
                assert "4 pictures in" in str(list(visitor.follow()))
            used.append(resident_megabytes(server.process))
        print([round(megabytes) for megabytes in used[9::10]])
        assert used[-1] - used[49] < 20
