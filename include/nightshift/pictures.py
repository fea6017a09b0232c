"""Pictures: fetched, turned upright, made smaller and encoded anew, so that a provider takes them and they cost no more than they need.

What cannot be had or read is the fault of its row. What may be there in a moment (a store that does not answer) is nobody's fault
and stops the step, which is tried again.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Any, TypeVar

from nightshift.errors import BucketMissing, InputMissing, InputUnreadable, ProviderUnavailable
from nightshift.formats import Fault
from nightshift.job import URI, ImagesSpec, Job, RenditionSpec
from nightshift.runs import Site
from nightshift.shapes import PinnedObject
from nightshift.stores.objects import Objects, split_input

if TYPE_CHECKING:
    from PIL import Image

AT_ONCE = 8  # fetched side by side
AHEAD = 32  # rows whose pictures are fetched before they are asked for: what memory holds
MOST_BYTES = 24 << 20  # of a picture as it comes
MOST_PIXELS = 40_000_000  # to be decoded at once; JPEGs are decoded smaller, so that theirs may have more
LEAN_FORMATS = ("JPEG", "MPO", "PNG")  # others are decoded with copies, so that half as many pixels fit into memory
MOST_HEIGHT = 16_000  # of a rendition: WebP knows no larger ones
FETCH_TRIES = 3
FETCH_SECONDS = 30.0  # without a byte
FETCH_MOST_SECONDS = 120.0
IN_MEMORY = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")  # how Python shows an object that has no other words
QUALITY = 85
PIXELS_PER_TOKEN = 750  # what a picture costs, by Anthropic's formula; OpenAI's tiles and patches come near it
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # of EXIF
MEDIA_TYPES = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "avif": "image/avif"}

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture as it is sent."""

    media_type: str
    data: bytes
    tokens: int  # what the model reads it as
    digest: bytes  # of what came: another version of an encoder does not make it another picture

    @property
    def base64(self) -> str:
        """As JSON carries it."""
        return b64encode(self.data).decode()


@dataclass(frozen=True, slots=True)
class Shown:
    """What a row shows: its pictures, and where the renditions of the first of them are, by column."""

    pictures: list[Picture]
    renditions: dict[str, str]


class PictureUnreadable(Exception):
    """Why a row is rejected."""


class Pictures:
    """Loads the pictures of rows from wherever their columns say: an object's URI, an address on the web, or the bytes themselves.

    With `keep`, the renditions are written: named by what they are made of, so that each is made once and none ever changes.
    """

    def __init__(self, site: Site, job: Job, objects: Iterable[PinnedObject] = (), *, keep: bool) -> None:
        """`objects`: those that are rows themselves, and are read as they are pinned."""
        assert job.spec.request.images is not None
        self._site, self._spec, self._renditions, self._keep = site, job.spec.request.images, job.spec.output.renditions, keep
        self._folder = f"results/{job.name}/_renditions"
        self._buckets: dict[str, Objects] = {}
        self._pinned = {found.uri: found for found in objects}
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="pictures")
        # One at a time, and always in the same thread: a large picture is hundreds of megabytes while it is open, and what one
        # thread gives back another one cannot have from the allocator.
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def __enter__(self) -> Pictures:
        """Ready to load."""
        return self

    def __exit__(self, *error: object) -> None:
        """What is under way ends; nothing more begins."""
        self._pool.shutdown(cancel_futures=True)
        self._decoder.shutdown(cancel_futures=True)

    def of(self, rows: Iterable[dict[str, Any] | Fault]) -> Iterator[tuple[dict[str, Any] | Fault, Shown | str]]:
        """Each row with what it shows, or why it is rejected; loaded some rows ahead."""
        return ahead(self._pool, self.show, rows)

    def show(self, row: Mapping[str, Any] | Fault) -> Shown | str:
        """The pictures of a row in the order of the columns, or why the row is rejected."""
        if isinstance(row, Fault):
            return row.reason
        pictures: list[Picture] = []
        renditions: dict[str, str] = {}
        for column in self._spec.columns:
            value = row[column]
            for each in value if isinstance(value, list) else [value]:
                try:
                    source = self._fetch(each)
                    picture, made = self._decoder.submit(self._make, source).result()
                    renditions = renditions or made
                except PictureUnreadable as error:
                    return f"{column}: {error}"
                pictures.append(picture)
        return Shown(pictures, renditions) if pictures else f"{', '.join(self._spec.columns)}: no picture"

    def _make(self, source: bytes) -> tuple[Picture, dict[str, str]]:
        picture = prepare(source, self._spec)
        return picture, {spec.name: self._rendition(picture, source, spec) for spec in self._renditions}

    def _rendition(self, picture: Picture, source: bytes, spec: RenditionSpec) -> str:
        """The URI of a rendition."""
        key = f"{self._folder}/{picture.digest.hex()[:32]}-{spec.width}-{spec.quality}.{spec.format}"
        if self._keep and self._site.store.head(key) is None:
            self._site.store.put(key, render(source, spec))
        return self._site.store.uri_of(key)

    def _fetch(self, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise PictureUnreadable("no picture" if value in (None, "") else f"a {type(value).__name__} is no picture")
        if value.startswith(("http://", "https://")):
            return _download(value)
        if not URI.match(value):
            raise PictureUnreadable(f"{value[:100]!r} is neither a URI nor an address")
        return self._read(value)

    def _read(self, uri: str) -> bytes:
        try:
            root, key = split_input(uri)
            if root not in self._buckets:
                self._buckets[root] = self._site.open_input(f"{root}/")[0]
            found = self._buckets[root].head(key)
            if found is not None and found.size > MOST_BYTES:
                raise PictureUnreadable(f"{found.size:,} bytes are more than {MOST_BYTES:,}")
            if pinned := self._pinned.get(uri):
                with self._buckets[root].open(key, etag=pinned.etag, version=pinned.version) as file:
                    return file.read()
            data = self._buckets[root].get(key) if found else None
        except (InputMissing, BucketMissing) as error:
            raise PictureUnreadable("there is nothing at its URI") from error
        except (ValueError, UnicodeError, InputUnreadable) as error:
            raise PictureUnreadable(f"{uri[:100]!r} can be nobody's URI") from error
        if data is None:
            raise PictureUnreadable("there is nothing at its URI")
        return data


def prepare(data: bytes, spec: ImagesSpec) -> Picture:
    """A picture as the job wants it sent. Raises PictureUnreadable."""
    with _decoding(), _upright(data, (spec.longest_side, spec.longest_side)) as image:
        encoded = _encoded(image, spec.format, QUALITY)
        tokens = ceil(image.width * image.height / PIXELS_PER_TOKEN)
    return Picture(media_type=MEDIA_TYPES[spec.format], data=encoded, tokens=tokens, digest=hashlib.sha256(data).digest())


def render(data: bytes, spec: RenditionSpec) -> bytes:
    """A rendition: no wider than it says, and never larger than the picture is. Raises PictureUnreadable."""
    with _decoding(), _upright(data, (spec.width, MOST_HEIGHT)) as image:
        return _encoded(image, spec.format, spec.quality)


def ahead(pool: ThreadPoolExecutor, make: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[tuple[Given, Made]]:
    """What is given, with what is made of it in a pool, in order; so many are begun before they are asked for."""
    todo = iter(given)
    begun: list[tuple[Given, Future[Made]]] = [(each, pool.submit(make, each)) for each in islice(todo, AHEAD)]
    while begun:
        each, future = begun.pop(0)
        made = future.result()
        begun += [(after, pool.submit(make, after)) for after in islice(todo, 1)]
        yield each, made


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever a codec raises is the picture's fault: they raise what their C code and other people's bytes make of each other."""
    try:
        yield
    except PictureUnreadable:
        raise
    except Exception as error:
        why = IN_MEMORY.sub("it", str(error))[:100]  # the same picture is rejected in the same words
        raise PictureUnreadable(f"not a picture that can be read ({why or type(error).__name__})") from error


def _upright(data: bytes, box: tuple[int, int]) -> Image.Image:
    """A picture no larger than a box, upright, in colours that every format has.

    It is made small before anything else is done to it, so that only one copy of it is ever large.
    """
    from PIL import Image, ImageOps

    image: Image.Image = Image.open(io.BytesIO(data))
    is_turned = image.getexif().get(ORIENTATION, 1) in QUARTER_TURNS
    box = _fitted(image.size, (box[1], box[0]) if is_turned else box)
    image.draft("RGB", box)
    if image.width * image.height > (MOST_PIXELS if image.format in LEAN_FORMATS else MOST_PIXELS // 2):
        raise PictureUnreadable(f"{image.width:,} × {image.height:,} pixels are too many")
    if image.mode.startswith("I"):  # 16 bits of grey, which would be cut off and not scaled
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode in ("1", "P", "PA"):  # colours by number cannot be mixed
        image = image.convert("RGBA")
    elif image.mode == "F":
        raise PictureUnreadable("its pixels are real numbers")
    image = image.resize(box, reducing_gap=2.0) if image.size != box else image
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        canvas = Image.new("RGBA", upright.size, "white")
        canvas.alpha_composite(upright.convert("RGBA"))
        return canvas.convert("RGB")
    return upright.convert("RGB")


def _fitted(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """A size made as small as a box, in its own proportions."""
    scale = min(1.0, box[0] / size[0], box[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _encoded(image: Image.Image, form: str, quality: int) -> bytes:
    target = io.BytesIO()
    options: dict[str, Any] = {"optimize": True} if form == "png" else {"quality": quality}
    image.save(target, form.upper(), **options)
    return target.getvalue()


def _download(url: str) -> bytes:
    """A picture from the web. A server that says no is believed; one that does not answer now may do so when the step is tried again."""
    import httpx2

    why = "no answer"
    for attempt in range(FETCH_TRIES):
        if attempt:
            time.sleep(2.0**attempt)
        try:
            with httpx2.stream("GET", url, follow_redirects=True, timeout=FETCH_SECONDS) as answer:
                if answer.status_code == 200:
                    return _bounded(answer.iter_bytes(), time.monotonic() + FETCH_MOST_SECONDS)
                why = f"HTTP {answer.status_code}"
                if answer.status_code not in (408, 425, 429) and answer.status_code < 500:
                    raise PictureUnreadable(f"cannot be fetched ({why})")
        except httpx2.HTTPError as error:
            why = type(error).__name__
        except (httpx2.InvalidURL, ValueError) as error:
            raise PictureUnreadable(f"{url[:100]!r} can be nobody's address") from error
    raise ProviderUnavailable(url[:200], f"a picture cannot be fetched from there now ({why}).")


def _bounded(chunks: Iterable[bytes], until: float) -> bytes:
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if time.monotonic() > until:
            raise PictureUnreadable(f"not fetched within {FETCH_MOST_SECONDS:.0f} seconds")
        if len(data) > MOST_BYTES:
            raise PictureUnreadable(f"more than {MOST_BYTES:,} bytes")
    return bytes(data)
