import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diptych.data.images import MAX_PIXELS, decode
from diptych.errors import ImageError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixels."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for name, content in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
    ):
        chunks += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return chunks


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_formats(kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    found = decode(encoded(Image.new("RGB", (3, 2), (200, 30, 60)), kind, **options))
    assert found.size == (3, 2)
    assert np.abs(np.subtract(pixel(found), (200, 30, 60))).max() <= (3 if kind == "JPEG" else 0)


def test_one_pixel_and_very_wide():
    assert decode(encoded(Image.new("RGB", (1, 1), RED))).size == (1, 1)
    assert decode(encoded(Image.new("RGB", (20_000, 2), RED))).size == (20_000, 2)


def test_pixels_pass_through():
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(decode(pixels), pixels)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_001, 10_000), (MAX_PIXELS + 1, 1)])
def test_too_large_is_refused_before_decoding(width, height):
    with pytest.raises(ImageError, match=r"[Aa]t most 100,000,000"):
        decode(png_header(width, height))


def test_just_small_enough_is_tried():
    with pytest.raises(ImageError, match=r"could not be decoded"):  # there are no pixels in it
        decode(png_header(10_000, 10_000))


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (b"", "0 bytes"),
        (b"these are words, not pixels", "are no image in a known format"),
        (encoded(Image.new("RGB", (64, 64), RED), "JPEG")[:400], "could not be decoded"),
        (encoded(Image.effect_noise((64, 64), 90))[:2000], "could not be decoded"),
        (encoded(Image.effect_noise((64, 64), 90))[:20] + b"\0" * 500, "could not be decoded|no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no image in a known format"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "zeros", "postscript"],
)
def test_bad_bytes(bad, complaint):
    with pytest.raises(ImageError, match=complaint):
        decode(bad)


def test_cmyk():
    assert pixel(decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))) == RED


@pytest.mark.parametrize("mode", ["1", "L"])
def test_gray(mode):
    assert pixel(decode(encoded(Image.new(mode, (2, 2), 255)))) == (255, 255, 255)
    assert pixel(decode(encoded(Image.new(mode, (2, 2), 0)))) == (0, 0, 0)


def test_sixteen_bit_gray_keeps_its_brightness():
    values = np.array([[0, 257, 32_896, 65_535]], dtype=np.uint16)
    found = decode(encoded(Image.fromarray(values)))
    assert [pixel(found, x)[0] for x in range(4)] == [0, 1, 128, 255]
    dark = decode(encoded(Image.fromarray(np.full((1, 1), 200, dtype=np.uint16))))
    assert pixel(dark) == (1, 1, 1)  # 200 / 257, rounded: dark stays dark


@pytest.mark.parametrize(
    ("values", "gray"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 255.0], [0, 100, 255]), ([np.nan, 0.0, 1e6], [0, 0, 255])],
)
def test_float_scales(values, gray):
    found = decode(encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
    assert [pixel(found, x)[0] for x in range(3)] == gray


def test_transparency_shows_the_background():
    clear = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert pixel(decode(clear)) == (255, 255, 255)
    assert pixel(decode(clear, background=(1, 2, 3))) == (1, 2, 3)
    half = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))
    assert np.abs(np.subtract(pixel(decode(half, background=(0, 0, 0))), (128, 0, 0))).max() <= 1
    assert pixel(decode(encoded(Image.new("LA", (2, 2), (0, 0))), background=BLUE)) == BLUE


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])], ids=["one colour", "one alpha per colour"])
def test_palette_with_transparency(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    found = decode(encoded(image, transparency=transparency), background=(9, 9, 9))
    assert [pixel(found, 0), pixel(found, 1)] == [(9, 9, 9), BLUE]


def test_transparent_colour_of_an_rgb_png():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    found = decode(encoded(image, transparency=RED), background=(9, 9, 9))
    assert [pixel(found, 0), pixel(found, 1)] == [(9, 9, 9), BLUE]


# Where the top left corner of the stored image stands once it is upright.
CORNERS = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
CORNERS |= {5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    stored = Image.new("RGB", (32, 16))
    stored.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, "JPEG", exif=exif, quality=100))
    assert found.size == ((32, 16) if orientation < 5 else (16, 32))
    right, bottom = found.width - 1, found.height - 1
    corners = {"top left": (0, 0), "top right": (right, 0), "bottom left": (0, bottom), "bottom right": (right, bottom)}
    assert [name for name, place in corners.items() if pixel(found, *place)[0] > 128] == [CORNERS[orientation]]


def test_damaged_exif_costs_neither_image_nor_rotation():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    damaged = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x15\x00\x02")  # words where a number belongs
    assert damaged != exif.tobytes()
    assert decode(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=damaged)).size == (2, 4)
    assert decode(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")).size == (4, 2)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert pixel(decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))) == RED
