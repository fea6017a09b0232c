"""The object store behind one small interface: S3, GCS, Azure and local folders through obstore.

Objects are created, found and read, and a few that say what stands now are replaced; none is edited. A failed look never means
"not there": only the store's own 404 does.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, MemoryStore, from_url
from pydantic import ValidationError

from nightshift.aws import default_session, make_client
from nightshift.errors import (
    AccessDenied,
    BucketMissing,
    InputChanged,
    InputMissing,
    InputUnreadable,
    LedgerCorrupt,
    SettingInvalid,
    StoreUnavailable,
)
from nightshift.shapes import Wire

if TYPE_CHECKING:
    import boto3
    from obstore.store import ObjectStore as AnyStore

Shape = TypeVar("Shape", bound=Wire)
Done = TypeVar("Done")
Buffer = bytes | memoryview
READ_AHEAD = 4 << 20  # bytes per request of a sequential read: large enough that round trips vanish, small enough to stay flat
WHOLE_BYTES = 16 << 20  # of an object that is read in one request
PARTS_AT_ONCE = 2  # of a large upload, 5 MiB each: the next is made while one is under way
CLIENT = {"timeout": "120s", "connect_timeout": "5s"}
RETRY = {"max_retries": 5}
SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "https", "http")  # that obstore opens, beside local folders
NO_BUCKET = "NoSuchBucket"
WRONG_REGION = "redirect without LOCATION"  # S3's answer for a bucket of another region, in obstore's words
ODD_KEY, ODD_PATH = "object with invalid path", "Could not parse path"  # of an object in a listing; of one that is named
RENAME = "a key with an empty part, a part . or .., or a control character cannot be read here, so rename the object"
DENIED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AccessDenied", "403 Forbidden", "401 Unauthorized")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One object of a listing."""

    key: str
    etag: str
    version: str | None
    size: int  # bytes
    modified: float  # unix seconds, the store's clock


class Objects:
    """Objects below one root URI. Keys are relative to it, with `/` between their parts."""

    def __init__(self, uri: str, store: AnyStore) -> None:
        self.uri = uri if uri.endswith("://") else uri.rstrip("/")
        self._store = store

    def uri_of(self, key: str) -> str:
        """The full URI of a key."""
        return f"{self.uri}/{key}"

    def key_of(self, uri: str) -> str:
        """The key of a full URI below this root."""
        return uri.removeprefix(f"{self.uri}/")

    def create(self, key: str, data: bytes | Path) -> bool:
        """Write an object that must not exist yet (`If-None-Match: *`). False: somebody else's is there."""

        def write() -> bool:
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

        return self._change("create", key, write)

    def put(self, key: str, data: bytes | Path) -> None:
        """Write or replace an object. For content-addressed names and the one manifest that commits a partition."""
        self._change("put", key, lambda: obstore.put(self._store, key, data, max_concurrency=PARTS_AT_ONCE))

    def stream(self, key: str, pieces: Iterable[Buffer]) -> None:
        """Write or replace an object from pieces that are made on the way; readers see it when it is whole. Memory: some pieces."""
        self._change("put", key, lambda: obstore.put(self._store, key, iter(pieces), max_concurrency=PARTS_AT_ONCE))

    def get(self, key: str) -> bytes | None:
        """The bytes of a small object, or None when the store says that there is none."""
        with _translated(self.uri_of(key)):
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except (NotFoundError, FileNotFoundError) as error:
                if NO_BUCKET in str(error):
                    raise
                return None

    def read(self, key: str) -> io.BufferedIOBase | None:
        """A seekable reader of one object: whole and in one request where it is small, else in ranges; None where there is none."""
        with _translated(self.uri_of(key)):
            try:
                found = obstore.get(self._store, key)
            except (NotFoundError, FileNotFoundError) as error:
                if NO_BUCKET in str(error):
                    raise
                return None
            if found.meta["size"] <= WHOLE_BYTES:
                return io.BytesIO(found.bytes())
        return self.open(key)

    def create_shape(self, key: str, shape: Wire) -> bool:
        """Write a shape that must not exist yet. False: one is there."""
        return self.create(key, _json(shape))

    def put_shape(self, key: str, shape: Wire) -> None:
        """Write or replace a shape."""
        self.put(key, _json(shape))

    def get_shape(self, key: str, shape: type[Shape]) -> Shape | None:
        """The shape stored under a key, or None when there is none. Raises LedgerCorrupt on anything else."""
        data = self.get(key)
        if data is None:
            return None
        try:
            return shape.model_validate_json(data)
        except ValidationError as error:
            raise LedgerCorrupt(key, str(error)) from error

    def settle(self, key: str, shape: Shape) -> Shape:
        """Write a shape once and give what is stored: this one, or the one that was there first."""
        if self.create_shape(key, shape):
            return shape
        stored = self.get_shape(key, type(shape))
        if stored is None:
            raise StoreUnavailable(self.uri_of(key), "it exists for writers and is missing for readers")
        return stored

    def scan(self, prefix: str) -> Iterator[Found]:
        """Every object whose key starts with `prefix` up to a `/`, in the store's order."""
        with _translated(self.uri_of(prefix)):
            try:
                for page in obstore.list(self._store, prefix.rstrip("/") or None, chunk_size=1000):
                    yield from map(_found, page)
            except (NotFoundError, FileNotFoundError):
                return

    def folders(self, prefix: str) -> list[str]:
        """The folders right below a prefix, in key order."""
        with _translated(self.uri_of(prefix)):
            try:
                return sorted(obstore.list_with_delimiter(self._store, prefix)["common_prefixes"])
            except (NotFoundError, FileNotFoundError):
                return []

    def head(self, key: str) -> Found | None:
        """One object's facts, or None when the store says that there is none."""
        with _translated(self.uri_of(key)):
            try:
                return _found(obstore.head(self._store, key))
            except (NotFoundError, FileNotFoundError):
                return None

    def copy(self, key: str, target: str) -> None:
        """Copy an object inside the store, which moves no byte through here; what stands at the target is replaced."""
        self._change("put", target, lambda: obstore.copy(self._store, key, target))

    def delete(self, keys: list[str]) -> None:
        """Remove objects; those that are gone already do not matter."""

        def remove() -> None:
            with suppress(NotFoundError, FileNotFoundError):
                obstore.delete(self._store, keys)

        if keys:
            self._change("delete", keys[0], remove)

    def _change(self, verb: str, key: str, act: Callable[[], Done]) -> Done:
        """Do what changes the store: everything that does goes through here. `verb`: create, put or delete; `key`: of the first object."""
        with _translated(self.uri_of(key)):
            return act()

    def download(self, key: str, path: Path) -> Path:
        """Stream an object into a local file."""
        with _translated(self.uri_of(key)):
            if isinstance(self._store, LocalStore):
                shutil.copyfile(Path(cast("Any", self._store).prefix) / key, path)
                return path
            with path.open("wb") as file:
                for chunk in obstore.get(self._store, key).stream(min_chunk_size=READ_AHEAD):
                    file.write(chunk)
        return path

    def open(self, key: str, *, etag: str | None = None, version: str | None = None) -> io.BufferedReader:
        """A seekable reader of one object, in ranges. With `etag`, every range is read from that very object:

        a replaced or deleted one raises InputChanged (catalogue F12, F13) in place of a mixture.
        """
        size = _checked(self.head(key), self.uri_of(key)).size
        return io.BufferedReader(_Ranges(self, key, size, etag, version), buffer_size=READ_AHEAD)

    def read_range(self, key: str, start: int, end: int, etag: str | None, version: str | None) -> bytes:
        """Bytes `start` to `end` (exclusive) of an object, of the pinned one where `etag` is given."""
        options: dict[str, Any] = {"range": (start, end)}
        if version:
            options["version"] = version
        elif etag:
            options["if_match"] = etag
        with _translated(self.uri_of(key)):
            try:
                return bytes(obstore.get(self._store, key, options=cast("Any", options)).bytes())
            except (PreconditionError, NotFoundError, FileNotFoundError) as error:
                raise InputChanged(self.uri_of(key), etag or "") from error


class _Ranges(io.RawIOBase):
    """A raw, seekable file whose reads are range requests."""

    def __init__(self, objects: Objects, key: str, size: int, etag: str | None, version: str | None) -> None:
        self._objects, self._key, self._size, self._etag, self._version = objects, key, size, etag, version
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._at + len(view), self._size)
        if end <= self._at:
            return 0
        data = self._objects.read_range(self._key, self._at, end, self._etag, self._version)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_objects(uri: str, session: boto3.Session | None = None, s3_config: Mapping[str, Any] | None = None) -> Objects:
    """The store at a URI.

    s3:// takes endpoint, region and credentials from a boto3 session, as every AWS tool does (`AWS_*`, profiles,
    instance roles; inside Airflow the connection's own session and endpoint). Other schemes take obstore's environment.
    """
    parts = urlsplit(uri)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise InputMissing(uri, f"a local folder is written with three slashes: file:///{parts.netloc}{parts.path}")
        folder = Path(uri.removeprefix("file://") or "/")  # taken as it stands, like the keys of a bucket
        with _translated(uri):
            folder.mkdir(parents=True, exist_ok=True)
        return Objects(uri, LocalStore(folder))
    if parts.scheme == "memory":
        return Objects(uri, MemoryStore())
    if parts.scheme not in SCHEMES:
        raise SettingInvalid(
            [f"{uri}: expected s3://bucket/…, file:///folder/…, or one of {', '.join(f'{each}://' for each in SCHEMES[1:])}"]
        )
    options: Any = {**CLIENT, "allow_http": True}
    with _translated(uri):
        config: Any = _s3_config(session, s3_config) if parts.scheme == "s3" else {}
        return Objects(uri, from_url(uri, client_options=options, retry_config=cast("Any", RETRY), **config))


def open_input(pattern: str) -> tuple[Objects, str]:
    """The bucket (or folder) of an object pattern, and the key pattern inside it."""
    root, key_pattern = split_input(pattern)
    return open_objects(root), key_pattern


def split_input(pattern: str) -> tuple[str, str]:
    """The root URI and the key pattern of an object pattern. Raises InputMissing where it cannot name anything."""
    parts = urlsplit(pattern)
    if parts.scheme == "file":
        return "file://", pattern.removeprefix("file://").lstrip("/")
    root = f"{parts.scheme}://{parts.netloc}"
    if not parts.netloc:
        raise InputMissing(pattern, "the URI names no bucket")
    # '#' and '?' are legal in keys and in patterns, so the key is what follows the bucket, untouched.
    return root, pattern.removeprefix(root).lstrip("/")


def matching(objects: Objects, pattern: str) -> Iterator[Found]:
    """Objects whose key matches a pattern: exact, a folder (ending in `/`), or with `*`, `?`, `[…]` and `**`.

    An exact name wins over the pattern of the same spelling, so a key with brackets can be named as it is.
    """
    if not pattern.endswith("/") and (found := objects.head(pattern)):
        yield found
        return
    wild = min((pattern.find(char) for char in "*?[" if char in pattern), default=-1)
    folder = pattern if wild < 0 else pattern[:wild].rpartition("/")[0]
    if wild < 0 and not pattern.endswith("/"):
        next(objects.scan(folder), None)  # a HEAD does not tell a missing key from a missing bucket; a listing does
        return
    for found in objects.scan(folder):
        if wild < 0 or _matches(found.key, pattern):
            yield found


def matches(uri: str, pattern: str) -> bool:
    """Whether an object is one of those that a pattern names, without asking the store."""
    (root, key), (wanted_root, wanted) = split_input(uri), split_input(pattern)
    if root != wanted_root:
        return False
    return key == wanted or (key.startswith(wanted) if wanted.endswith("/") else _matches(key, wanted))


def _matches(key: str, pattern: str) -> bool:
    """Shell matching by path part: `*` stays inside one part, `**` crosses them."""
    return _match_parts(key.split("/"), pattern.split("/"))


def _match_parts(key: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not key
    if pattern[0] == "**":
        return any(_match_parts(key[i:], pattern[1:]) for i in range(len(key) + 1))
    return bool(key) and fnmatchcase(key[0], pattern[0]) and _match_parts(key[1:], pattern[1:])


def _s3_config(session: boto3.Session | None, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = session or default_session()
    overrides = dict(overrides or {})
    try:
        client = make_client(session, "s3", config=Config(s3={"addressing_style": "path"}), **overrides)
        provider = Boto3CredentialProvider(session)
    except (BotoCoreError, ValueError) as error:
        raise AccessDenied("AWS", f"{error} Set AWS_* variables or a profile; inside Airflow, the connection.") from error
    region = client.meta.region_name if client.meta.region_name not in (None, "aws-global") else "us-east-1"
    return {"endpoint": client.meta.endpoint_url, "region": region, "virtual_hosted_style_request": False, "credential_provider": provider}


def _found(meta: Any) -> Found:
    return Found(
        key=meta["path"],
        etag=meta["e_tag"] or "",
        version=meta["version"],
        size=meta["size"],
        modified=meta["last_modified"].timestamp(),
    )


def _checked(found: Found | None, uri: str) -> Found:
    if found is None:
        raise InputChanged(uri, "")
    return found


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """The store's errors as ours. What says 404 for an object is handled by the caller, who knows what it means."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise AccessDenied(where, _first_line(error)) from error
    except (NotFoundError, FileNotFoundError) as error:
        if NO_BUCKET in str(error):
            raise BucketMissing(where) from error
        raise InputMissing(where, _first_line(error)) from error
    except GenericError as error:
        text = str(error)
        if NO_BUCKET in text:
            raise BucketMissing(where) from error
        if WRONG_REGION in text:
            raise BucketMissing(where) from error
        if any(sign in text for sign in DENIED) or "CredentialProvider" in text:
            raise AccessDenied(where, _first_line(error)) from error
        if ODD_KEY in text:
            raise InputUnreadable(where, f"{_first_line(error)}; {RENAME}") from error
        raise StoreUnavailable(where, _first_line(error)) from error
    except ValueError as error:
        if ODD_PATH not in str(error):
            raise
        raise InputUnreadable(where, f"{_first_line(error)}; {RENAME}") from error
    except (BaseError, OSError) as error:
        raise StoreUnavailable(where, _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _json(shape: Wire) -> bytes:
    return shape.model_dump_json(indent=1).encode()
