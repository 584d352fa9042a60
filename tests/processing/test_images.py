"""images: every mode becomes RGB as documented; whatever the bytes, an RGB image or InvalidRequest comes out."""

import io
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmfx.errors import InvalidRequest
from vlmfx.processing import images
from vlmfx.processing.images import image_size, load_image, loaded

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns about the damage that these tests do

ORIENTATION = 0x0112


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(mode="RGB", size=(24, 16)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBA", "LA"])
def test_pil_images_are_only_converted(mode):
    image = picture(mode)
    assert np.array_equal(pixels(load_image(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *[("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF")],
        *[("L", "JPEG"), ("RGB", "BMP"), ("RGB", "TIFF"), ("RGB", "PPM"), ("1", "PPM"), ("RGB", "WEBP")],
        ("RGB", "JPEG"),
    ],
)
def test_opaque_files_decode_as_pillow_does(mode, format):
    blob = encoded(picture(mode), format)
    assert np.array_equal(pixels(load_image(blob)), np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")))
    assert image_size(blob) == (16, 24)


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_alpha_of_files_is_laid_on_white(mode, format):
    colour = (100, 0) if mode == "LA" else (10, 20, 30, 0)
    blob = encoded(Image.new(mode, (4, 3), colour), format, **({"lossless": True} if format == "WEBP" else {}))
    assert (pixels(load_image(blob)) == 255).all()


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_palette_entries_become_white(format):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((1, 0), 1)
    out = pixels(load_image(encoded(image, format, transparency=0)))
    assert out[0].tolist() == [[255, 255, 255], [200, 0, 0]]


def test_one_transparent_colour_becomes_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    out = pixels(load_image(encoded(image, transparency=(1, 2, 3))))
    assert out[0].tolist() == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(format):
    values = np.array([[0, 100, 257, 32768, 65535]], dtype=np.uint16)

    def blob_of(values):
        image = Image.fromarray(values)
        return encoded(image.convert("I") if format == "PPM" else image, format)

    blob = blob_of(values)
    expected = [0, 0, 1, 128, 255]
    assert pixels(load_image(blob))[0, :, 0].tolist() == expected
    assert pixels(load_image(Image.open(io.BytesIO(blob))))[0, :, 0].tolist() == expected
    dark = blob_of(np.full((2, 2), 200, dtype=np.uint16))
    assert (pixels(load_image(dark)) == 1).all()


def test_32_bit_grey():
    assert pixels(load_image(picture("L").convert("I")))[..., 0].tolist() == np.asarray(picture("L")).tolist()
    wide = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert pixels(load_image(wide))[0, :, 0].tolist() == [0, 255]
    for bad in (-1, 65536):
        with pytest.raises(InvalidRequest, match=r"0\.\.65535"):
            load_image(Image.fromarray(np.array([[0, bad]], dtype=np.int32)))
    with pytest.raises(InvalidRequest, match="floats"):
        load_image(Image.new("F", (2, 2)))


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        blob = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert pixels(load_image(blob))[0, 0].tolist() == [255, 0, 0]
        assert image_size(blob) == (4, 5)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied_to_files_and_seen_by_image_size(format, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    ramp = np.broadcast_to(np.linspace(0, 255, 48, dtype=np.uint8)[None, :, None], (32, 48, 3))
    blob = encoded(Image.fromarray(np.ascontiguousarray(ramp)), format, exif=exif)
    image = load_image(blob)
    assert image_size(blob) == (image.height, image.width)
    assert (image.width, image.height) == ((32, 48) if 5 <= orientation <= 8 else (48, 32))
    bright = {2: "left", 3: "left", 5: "bottom", 6: "bottom", 7: "top", 8: "top"}.get(orientation, "right")
    grey = pixels(image)[..., 0].astype(float)
    edges = {"left": grey[:, 0], "right": grey[:, -1], "top": grey[0], "bottom": grey[-1]}
    assert max(edges, key=lambda name: edges[name].mean()) == bright
    if format != "TIFF":  # Pillow itself turns a TIFF when it decodes
        assert load_image(Image.open(io.BytesIO(blob))).size == (48, 32)


def test_arrays():
    rgb = np.asarray(picture())
    assert np.array_equal(pixels(load_image(rgb)), rgb)
    assert np.array_equal(pixels(load_image(rgb[..., 0]))[..., 1], rgb[..., 0])
    assert np.array_equal(pixels(load_image(rgb[..., :1]))[..., 1], rgb[..., 0])
    assert np.array_equal(pixels(load_image(np.dstack([rgb, rgb[..., 0]]))), rgb)
    assert np.array_equal(pixels(load_image(rgb[::-1, ::2])), rgb[::-1, ::2])
    assert image_size(rgb) == (16, 24)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint16),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_that_do_not_fit(array):
    with pytest.raises(InvalidRequest) as caught:
        load_image(array, field="images[2]")
    assert caught.value.field == "images[2]"


def test_files(tmp_path):
    path = tmp_path / "a.bin"  # the suffix does not matter
    path.write_bytes(encoded(picture()))
    for source in (path, str(path)):
        assert load_image(source).size == (24, 16)
        assert image_size(source) == (16, 24)
    os.mkfifo(tmp_path / "pipe")  # would wait for ever if it were opened
    for bad in (tmp_path, tmp_path / "none.png", tmp_path / "pipe", "", "a\0b", "x" * 5000, "http://h/a.png"):
        for read in (load_image, image_size):
            with pytest.raises(InvalidRequest):
                read(bad)


@pytest.mark.parametrize("blob", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0" * 100])
def test_bytes_that_are_no_image(blob):
    for read in (load_image, image_size):
        with pytest.raises(InvalidRequest):
            read(blob)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_truncated(format):
    blob = encoded(picture(size=(200, 200)), format)[:-2000]
    with pytest.raises(InvalidRequest):
        load_image(blob)


def test_a_lazy_pil_image_of_a_truncated_file():
    image = Image.open(io.BytesIO(encoded(picture(size=(200, 200)))[:-2000]))
    with pytest.raises(InvalidRequest):
        load_image(image)
    closed = picture()
    closed.close()
    with pytest.raises(InvalidRequest):
        load_image(closed)


def test_bombs_are_refused_by_their_header():
    bomb = bytearray(encoded(Image.new("L", (16, 16))))
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes(bomb[24:29])
    bomb[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    for limit in (1000, 178_956_970, 10**12):
        for read in (load_image, image_size):
            with pytest.raises(InvalidRequest, match="pixels"):
                read(bytes(bomb), max_pixels=limit)
    with pytest.raises(InvalidRequest, match="24x16 pixels but at most 383"):
        load_image(picture(), max_pixels=383)
    assert load_image(picture(), max_pixels=384).size == (24, 16)


def test_one_pixel_and_none():
    assert pixels(load_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))))).tolist() == [[[1, 2, 3]]]
    with pytest.raises(InvalidRequest, match="0x5"):
        load_image(Image.new("RGB", (0, 5)))


def test_other_types_are_named():
    with pytest.raises(InvalidRequest, match="type int"):
        load_image(3)  # type: ignore[arg-type]


KINDS: list[tuple[str, str, dict]] = [
    ("RGB", "PNG", {}),
    ("P", "PNG", {"transparency": 3}),
    ("RGBA", "PNG", {}),
    ("RGB", "JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
    ("CMYK", "JPEG", {}),
    ("P", "GIF", {}),
    ("RGBA", "WEBP", {}),
    ("RGB", "TIFF", {}),
    ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    ("L", "TIFF", {"compression": "tiff_deflate"}),
    ("RGB", "BMP", {}),
    ("L", "PPM", {}),
]
SEEDS = [encoded(picture(mode), format, **options) for mode, format, options in KINDS]
SEEDS += [encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000))]


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=0, max_size=6), st.integers(0, 6)), max_size=5),
    st.integers(0, 4000),
)
def test_damaged_bytes_give_an_image_or_our_error(blob, edits, keep):
    for at, new, dropped in edits:
        at %= len(blob) or 1
        blob = blob[:at] + new + blob[at + dropped :]
    blob = blob[:keep] if keep % 4 == 0 else blob
    try:
        image = load_image(blob, max_pixels=1_000_000)
    except InvalidRequest:
        return
    assert image.mode == "RGB"
    assert image_size(blob) == (image.height, image.width)


def test_threads_may_share_an_image_that_is_opened_and_not_decoded(tmp_path):
    """As n questions about one Image.open(...) do."""
    path = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            image = Image.open(path)
            for loaded in threads.map(lambda i: load_image(i), [image] * 8):
                assert np.array_equal(np.asarray(loaded), noise)


def test_large_images_are_there_one_at_a_time(monkeypatch):
    monkeypatch.setattr(images, "LARGE_PIXELS", 24 * 16 - 1)
    blob, inside, most = encoded(picture()), [], []

    def load(_):
        with loaded(blob) as image:
            inside.append(image)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(load, range(8)))
        assert most == [1] * 8
        monkeypatch.setattr(images, "LARGE_PIXELS", 24 * 16)
        list(threads.map(load, range(8)))
    assert max(most) > 1
    with pytest.raises(InvalidRequest), loaded(blob[:60]):
        pass


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_bands_change_no_pixel(mode, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8)).convert(mode)
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    blob = encoded(image, "PNG", **options)
    whole = pixels(load_image(blob))
    for size in (1, 23, 100, 23 * 36):
        monkeypatch.setattr(images, "BAND_PIXELS", size)
        assert np.array_equal(pixels(load_image(blob)), whole)
