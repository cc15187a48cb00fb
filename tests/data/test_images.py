"""Files that people bring (PITFALLS), sizes, and saving."""

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from squeeze_jax.data.images import (
    load_image,
    parse_size,
    reference_size,
    resize_for_reference,
    resize_for_target,
    save_png,
    to_float,
    to_rgb,
    to_uint8,
)
from squeeze_jax.errors import InputError

# Other work on the machine must not fail a test: no time limits on single examples.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def corners(size=(40, 20)):
    """Black with a red upper-left corner."""
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), (0, 0, 8, 8))
    return image


# Decoding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    stored = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = corners() if stored is None else corners().transpose(stored)
    image.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    loaded = load_image(tmp_path / "phone.jpg")
    assert loaded.size == (40, 20)
    red, _, _ = loaded.getpixel((3, 3))
    assert red > 200
    assert max(loaded.getpixel((36, 16))) < 60


@pytest.mark.parametrize(
    "junk",
    [
        b"junk",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\x05\0\x12\x01\x02\0\xff\xff\0\0",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    ],
    ids=["junk", "offset", "cut", "orientation 99"],
)
def test_junk_in_exif_harms_nobody(tmp_path, junk):
    corners().save(tmp_path / "e.jpg", exif=b"Exif\0\0" + junk)
    assert load_image(tmp_path / "e.jpg").size == (40, 20)


@pytest.mark.parametrize(
    ("mode", "colour"), [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("RGBA", (255, 0, 0, 255))], ids=str
)
def test_transparency_is_laid_on_white(tmp_path, mode, colour):
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    expected = (255, 255, 255) if colour[-1] == 0 else (255, 0, 0)
    assert load_image(tmp_path / "a.png").getpixel((1, 1)) == expected


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"], ids=["index", "bytes"])
def test_a_palettes_transparency_is_laid_on_white(tmp_path, transparency):
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=transparency)
    loaded = load_image(tmp_path / "p.png")
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
def test_a_16_bit_ramp_stays_a_ramp(tmp_path, name):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (4, 1))).save(tmp_path / name)
    values = np.asarray(load_image(tmp_path / name))[0, :, 0]
    np.testing.assert_array_equal(values, np.arange(256))


def test_cmyk_and_grey_and_black_and_white(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    red, green, blue = load_image(tmp_path / "c.jpg").getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15
    for mode in ("L", "1"):
        Image.new(mode, (8, 8), 255).save(tmp_path / "g.png")
        assert load_image(tmp_path / "g.png").getpixel((4, 4)) == (255, 255, 255)


def test_values_of_32_bits_have_no_known_range(tmp_path):
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="32-bit values has no known range"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_gives_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(tmp_path / name).getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)


def test_floats_have_no_known_range(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(InputError, match="8 or 16 bits"):
        load_image(tmp_path / "f.tif")


def photo_bytes(suffix):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, format={"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix])
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_files_are_named(tmp_path, suffix, share):
    content = photo_bytes(suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=rf"cut\.{suffix}.*re-save") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


@UNHURRIED
@given(
    st.binary(max_size=64), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\x00", b"BM"])
)
def test_any_bytes_give_a_picture_or_one_sentence(tmp_path_factory, content, magic):
    path = tmp_path_factory.getbasetemp() / "bytes.bin"
    path.write_bytes(magic + content)
    try:
        outcome = load_image(path).mode
    except InputError as error:
        outcome = str(error)
    assert outcome == "RGB" or "bytes.bin" in outcome


def test_missing_folder_and_too_large(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png: no such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="a folder"):
        load_image(tmp_path)
    Image.new("1", (200, 100)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match=r"large\.png: 200x100 pixels are more than the limit of 9999"):
        load_image(tmp_path / "large.png", max_pixels=9999)


@pytest.mark.parametrize("side", [11_000, 20_000])
def test_a_bomb_is_refused_without_warnings_and_before_decoding(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"bomb\.png: .*more than the limit of 100000000"):
        load_image(tmp_path / "bomb.png")


# Sizes


def test_target_covers_and_is_cut_in_the_middle():
    image = Image.new("RGB", (96, 32), "black")
    image.paste("white", (32, 0, 64, 32))
    cut = resize_for_target(image, 32, 32)
    assert cut.shape == (32, 32, 3)
    assert cut.dtype == np.float32
    np.testing.assert_array_equal(cut, 1.0)


def test_a_target_of_the_right_size_is_left_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    np.testing.assert_array_equal(resize_for_target(image, 32, 48), to_float(image))
    np.testing.assert_array_equal(resize_for_reference(image, 48), to_float(image))


@UNHURRIED
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 8), st.integers(1, 8))
def test_any_target_size_from_any_picture(width, height, rows, columns):
    assert resize_for_target(Image.new("L", (width, height)).convert("RGB"), 16 * rows, 16 * columns).shape == (
        16 * rows,
        16 * columns,
        3,
    )


def test_a_very_wide_reference_keeps_its_ends():
    image = Image.new("RGB", (1600, 100), "black")
    image.paste("white", (0, 0, 50, 100))
    image.paste("red", (1550, 0, 1600, 100))
    wide = resize_for_reference(image, 512)
    assert wide.shape == (32, 512, 3)
    np.testing.assert_allclose(wide[16, 2], [1, 1, 1], atol=0.05)
    np.testing.assert_allclose(wide[16, -3], [1, -1, -1], atol=0.05)


@UNHURRIED
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(16, 1024))
def test_reference_sizes(height, width, long_side):
    new = reference_size(height, width, long_side)
    assert all(side % 16 == 0 and 16 <= side <= long_side for side in new)
    scale = min(1, long_side / max(height, width))
    for before, after in zip((height, width), new, strict=True):
        assert abs(after - before * scale) <= 8 or after == 16 or after == long_side // 16 * 16


@pytest.mark.parametrize(
    ("text", "size"), [("512", (512, 512)), ("512x768", (512, 768)), ("256x128", (256, 128)), (" 16 X 32 ", (16, 32))]
)
def test_sizes_are_height_times_width(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("250x130", "size 250x130 .*nearest size is 256x128"),
        ("0", "nearest size is 16x16"),
        ("513", "nearest size is 512x512"),
        ("big", "'big' is not understood"),
        ("512x", "not understood"),
        ("-16x16", "not understood"),
        ("1x2x3", "not understood"),
        ("", "not understood"),
    ],
)
def test_other_sizes_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_size(text)


# Arrays and saving


def test_eight_bits_survive_the_round_trip():
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(to_uint8(to_float(Image.fromarray(values))), values)
    np.testing.assert_array_equal(to_uint8(np.float32([[[-7, 7, 0]]])), [[[0, 255, 128]]])


def test_png_holds_the_settings(tmp_path):
    path = tmp_path / "new" / "out.png"
    pixels = np.random.default_rng(0).uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    save_png(path, pixels, {"prompt": "eine Katze, 猫", "seed": 3, "references": ["a.png"]})
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), to_uint8(pixels))
        assert image.text == {"prompt": "eine Katze, 猫", "seed": "3", "references": '["a.png"]'}
    assert [p.name for p in path.parent.iterdir()] == ["out.png"]


def test_a_failing_save_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="PNG"):
        save_png(tmp_path / "out.jpg", np.zeros((8, 8, 3), np.uint8), {})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_png(tmp_path / "file" / "out.png", np.zeros((8, 8, 3), np.uint8), {})
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_png(tmp_path / "taken.png", np.zeros((8, 8, 3), np.uint8), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.png"]


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    """Ctrl-C in the middle of writing: neither half a picture nor a part beside it."""
    path = tmp_path / "out.png"
    save_png(path, np.zeros((8, 8, 3), np.uint8), {})
    before = path.read_bytes()

    def interrupted(self, file, **how):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    for name in ("out.png", "other.png"):
        with pytest.raises(KeyboardInterrupt):
            save_png(tmp_path / name, np.ones((8, 8, 3), np.uint8), {})
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
    assert path.read_bytes() == before


def test_pictures_in_memory_take_the_same_road():
    assert to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_a_file_that_others_programs_would_read_is_no_picture(tmp_path):
    """PostScript in any disguise; what people have is read, whatever it is called."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8))
    picture.save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "drawing.png")
    with pytest.raises(InputError, match=r"drawing\.png: not a picture, or of an unknown format"):
        load_image(tmp_path / "drawing.png")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        picture.save(tmp_path / "photo.txt", kind)
        assert load_image(tmp_path / "photo.txt").size == (24, 16)
