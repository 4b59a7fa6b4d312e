"""Images as they come, in files or bytes, to three channels, upright; or one sentence about what is wrong with them."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112


class BadImage(Exception):
    """An image that cannot be used; its text says why, as it reads behind the image's name."""


def to_rgb(image: Image) -> Image:
    """Returns an image with three channels of 8 bits, upright as its EXIF data say.

    What is transparent lies on white: most transparent pictures are drawn for a light page, and their hidden colours,
    often black, are not meant to be seen. 16-bit grey values are divided by 256, where Pillow would cut them at 255. Of
    an animation it is the first frame.

    Raises:
        UserError: Not a Pillow image.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise UserError(f"An image of the pairs is of type {type(image).__name__}: expected a Pillow image.")
    if image.mode == "RGB" and _ORIENTATION not in image.getexif() and "transparency" not in image.info:
        return image
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(source: Any, base: Path | None = None) -> Image:
    """Decodes what a data set holds for an image: a path, bytes, ``{"bytes", "path"}`` or a Pillow image.

    Pillow's limit on the number of pixels stays in force.

    Args:
        source: The image.
        base: Folder that a relative path starts from; the working folder by default.

    Raises:
        BadImage: It is missing, truncated, of no known format or too large.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _whole(source)
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, bytes):
        if not source:
            raise BadImage("is empty")
        return _whole(io.BytesIO(source))
    if isinstance(source, str) and source:
        if source.startswith(("http://", "https://")):
            raise BadImage("is an address on the network: fetch the images first")
        path = (base or Path()) / Path(source).expanduser()
        if not path.is_file():
            raise BadImage("does not exist" if not path.exists() else "is not a file")
        return _whole(path)
    raise BadImage("is missing" if source is None or source == "" else f"is of type {type(source).__name__}")


def _whole(source: Any) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Between the limit and twice the limit Pillow only warns, and so do we: not at all.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source)
            image.load()
        return to_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("is not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise BadImage("has more pixels than Pillow allows (see PIL.Image.MAX_IMAGE_PIXELS)") from error
    except PermissionError as error:
        raise BadImage("cannot be read: permission denied") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if "truncated" in text.lower() or isinstance(error, EOFError):
            raise BadImage("is truncated") from error
        raise BadImage(f"cannot be decoded ({text})") from error


def image_name(source: Any) -> str:
    """Returns a path or name of an image for messages; an empty string if it has none."""
    if isinstance(source, dict):
        source = source.get("path")
    return source if isinstance(source, str) else ""


def image_identity(source: Any, base: Path | None = None) -> Any:
    """Returns what tells an image from others, without decoding it: a hash of its bytes, or its path."""
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=16).digest()
    return str((base or Path()) / source) if isinstance(source, str) else id(source)
