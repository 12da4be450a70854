"""Images of prompts, opened as PIL images: only the usual formats, and none that would fill the memory."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cagsr.errors import DataError
from cagsr.flow import Picture
from cagsr.support.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Those that Pillow reads by itself: some others run programs."""


def as_data_url(picture: Picture, most: int | None = None) -> str:
    """An image as a data URL of a PNG, its longer side at most ``most`` pixels (None: as it is)."""
    image = open_picture(picture)
    if most is not None:
        image.thumbnail((most, most))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def open_picture(picture: Picture) -> Image:
    """The image in RGB, transparent parts white; DataError, in one sentence, where it can't be read or is too large."""
    with _opened(picture) as found:
        from PIL import Image, ImageOps

        found = ImageOps.exif_transpose(found)  # as a viewer shows it, and as boxes count
        if found.has_transparency_data:
            layers = found.convert("RGBA")
            white = Image.new("RGBA", layers.size, "white")
            return Image.alpha_composite(white, layers).convert("RGB")
        return found.convert("RGB")


def pixels_of(picture: Picture) -> int:
    """How many pixels an image says it has, before any is read; DataError as :func:`open_picture`."""
    with _opened(picture) as found:
        return int(found.width * found.height)


@contextmanager
def _opened(picture: Picture) -> Iterator[Image]:
    """The image, whose pixels are read inside the block."""
    require("A prompt with images", "images", modules=["PIL"])
    from PIL import Image, UnidentifiedImageError

    source: Any = io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    except FileNotFoundError as error:
        raise DataError(
            f"{picture.name}: there is no such image file; its path counts from the data's folder."
        ) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = Image.MAX_IMAGE_PIXELS
        raise DataError(f"{picture.name}: the image has more than {most:,} pixels; make it smaller.") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{picture.name}: is no image in {', '.join(FORMATS)}; convert it or leave the row out."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # a broken file
        raise DataError(f"{picture.name}: the image can't be read ({error}); mend it or leave the row out.") from error
