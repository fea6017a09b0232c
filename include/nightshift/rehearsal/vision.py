"""What the rehearsal's model sees in a picture: its shape, its light and its main colour. No more: it is no vision model."""

from __future__ import annotations

import io
from base64 import b64decode
from collections.abc import Iterator
from math import ceil
from typing import Any

from nightshift.pictures import PIXELS_PER_TOKEN

COLOURS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "red": (200, 40, 40), "orange": (240, 150, 40),
    "yellow": (240, 220, 60), "green": (60, 150, 60), "blue": (50, 90, 200), "purple": (130, 60, 160), "brown": (120, 80, 50),
}  # fmt: skip
BRIGHT = 128


def describe(data: bytes) -> str:
    """A picture in one sentence."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        red, green, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]  # the mean, as a tuple of three
    shape = "wide" if width > height else "tall" if height > width else "square"
    colour = min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], (red, green, blue), strict=True)))
    light = "bright" if (red + green + blue) / 3 >= BRIGHT else "dark"
    return f"A {shape} and {light} picture, mostly {colour}."


def tokens(data: bytes) -> int:
    """What a picture is billed as."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return ceil(image.width * image.height / PIXELS_PER_TOKEN)


def pictures_in(value: Any) -> Iterator[bytes]:
    """Every picture in a body, in the words of any provider."""
    if isinstance(value, list):
        for each in value:
            yield from pictures_in(each)
    elif isinstance(value, dict):
        encoded = _encoded(value)
        if encoded is not None:
            yield b64decode(encoded)
        else:
            yield from pictures_in(list(value.values()))


def without_pictures(value: Any) -> Any:
    """A body less its pictures: what is read as text."""
    if isinstance(value, list):
        return [without_pictures(each) for each in value]
    if isinstance(value, dict):
        return {} if _encoded(value) is not None else {name: without_pictures(each) for name, each in value.items()}
    return value


def _encoded(part: dict[str, Any]) -> str | None:
    """The base64 of a part that is a picture."""
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if isinstance(url, str) and url.startswith("data:"):
        return url.partition(",")[2]
    source = part.get("source") or (part.get("image") or {}).get("source") if isinstance(part.get("image") or {}, dict) else None
    found = (source.get("data") or source.get("bytes")) if isinstance(source, dict) else None
    return found if isinstance(found, str) else None
