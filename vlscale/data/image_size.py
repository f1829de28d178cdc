"""The size of an image as people see it, from its header alone."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from vlscale.data.images import MAX_PIXELS, ImageError, _orientation


def upright_size(content: bytes) -> tuple[int, int]:
    """Width and height in pixels, EXIF rotation applied; nothing is decoded.

    Raises:
        ImageError: no image, or one of more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            turned = _orientation(image) >= 5  # the orientations that swap the sides
    except Image.DecompressionBombError:
        raise ImageError(f"more than the limit of {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ImageError("not an image, or of an unknown format") from None
    except Exception as error:  # Pillow raises a dozen types on broken bytes
        raise ImageError(str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}") from None
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} × {height} pixels, more than the limit of {MAX_PIXELS:,}")
    return (height, width) if turned else (width, height)
