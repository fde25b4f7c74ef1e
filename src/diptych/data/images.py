"""Encoded bytes to a clean RGB image, or a clear error."""

import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from diptych.errors import ImageError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: 100 megapixels are 300 MB of RGB."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is read. Some other decoders of Pillow start programs (EPS starts Ghostscript), and images come from strangers."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    image: bytes | np.ndarray,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    reduce: Callable[[tuple[int, int]], int] | None = None,
) -> Image.Image:
    """Return an upright 8-bit RGB image, the first frame of an animation.

    EXIF rotation is applied, transparency is laid over `background`, 16-bit and float images are scaled to 8 bits,
    CMYK and palettes are converted. Pixels [h, w, 3] pass through.

    Args:
        image: An encoded file, or uint8 pixels.
        background: RGB, 0 to 255.
        reduce: By how much an image of (width, height) may be reduced. JPEG files are then decoded at 1/2, 1/4 or 1/8 of their size, the
            smallest allowed, in a fraction of the time; the pixels are not those of a full decoding reduced afterwards. None: exact.

    Raises:
        ImageError: If the bytes are no image, are cut short, or hold more than `MAX_PIXELS` pixels.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if not image:
        raise ImageError("An image was needed and its file is empty (0 bytes). Replace the file or drop the row.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata that does not touch the pixels
            opened = Image.open(io.BytesIO(image), formats=FORMATS)
            _check_size(*opened.size)
            if reduce is not None and (factor := reduce(opened.size)) > 1:
                opened.draft(None, (opened.width // factor, opened.height // factor))  # other formats ignore it
            opened.load()
            return to_rgb(_upright(opened), background)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{len(image):,} bytes that begin with {image[:12]!r} are no image in a known format ({', '.join(FORMATS)}). "
            "Convert the file or drop the row."
        ) from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, checked on opening
        raise ImageError(f"{error} At most {MAX_PIXELS:,} pixels are read. Reduce it first.") from error
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(
            f"{len(image):,} bytes could not be decoded as an image: {error}. Replace the file or drop the row."
        ) from error


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return any Pillow image as 8-bit RGB, transparency laid over `background`.

    The top of the scale is 65535 for integers, so 16-bit images keep their brightness; for floats it is 1, 255 or 65535, whichever
    first covers the image; beyond that the brightest pixel.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        brightest = float(values.max(initial=0))
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        top = next((scale for scale in scales if brightest <= scale), brightest)
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        canvas = Image.new("RGBA", foreground.size, (*background, 255))
        return Image.alpha_composite(canvas, foreground).convert("RGB")
    return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"The image has {width} x {height} pixels; at most {MAX_PIXELS:,} are read. Reduce it first.")


def _upright(image: Image.Image) -> Image.Image:
    # Not `ImageOps.exif_transpose`: that also rewrites the EXIF record, which fails where another entry of it is damaged.
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)
