"""Encoded bytes to a clean RGB image, or a clear error."""

import io

import numpy as np
from PIL import Image, ImageOps

from diptych.errors import ImageError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: 100 megapixels are 300 MB of RGB."""


def decode(image: bytes | np.ndarray, *, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Return an upright 8-bit RGB image.

    EXIF rotation is applied, transparency is laid over `background`, 16-bit and float images are scaled to 8 bits,
    CMYK and palettes are converted.

    Raises:
        ImageError: If the bytes are no image, are cut short, or hold more than `MAX_PIXELS` pixels.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        opened = Image.open(io.BytesIO(image))
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"The image has {width} x {height} pixels; at most {MAX_PIXELS:,} are read. Reduce it first."
            )
        opened.load()
        return to_rgb(ImageOps.exif_transpose(opened), background)
    except ImageError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        raise ImageError(
            f"{len(image):,} bytes could not be decoded as an image: {error}. Replace the file or drop the row."
        ) from error


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return any Pillow image as 8-bit RGB, transparency laid over `background`."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode != "F" and values.max(initial=0) > 255 else max(float(values.max(initial=0)), 1.0)
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        canvas = Image.new("RGBA", foreground.size, (*background, 255))
        return Image.alpha_composite(canvas, foreground).convert("RGB")
    return image.convert("RGB")
