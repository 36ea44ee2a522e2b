"""Tells a damaged image file from a whole one."""

import io

from PIL import Image, UnidentifiedImageError


def damage(data: bytes) -> str | None:
    """What is wrong with the bytes of an image file; None: nothing, or Pillow cannot tell.

    Decoders that only warn would let half an image pass.
    """
    if not data:
        return "the file is empty"
    try:
        with Image.open(io.BytesIO(data)) as picture:
            # A PNG has checksums: no need to decode it twice.
            picture.verify() if picture.format == "PNG" else picture.load()
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return None  # a format that Pillow does not know, or too large for it: others decide
    except Exception as error:  # Pillow has no common error for damage
        return f"damaged or truncated: {error}"
    return None
