"""Rows to requests. A request's identity is its content: its key is a hash of what is sent, and nothing else.

JSON escaping distributes over concatenation: what does not depend on the row is rendered, escaped and hashed once. The values of a
batch are escaped a column at a time and joined with what stands between them; a row alone costs the hash of what is its own.
"""

from __future__ import annotations

import hashlib
from binascii import hexlify
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import TemplateError

from nightshift.arrow import contents, whole
from nightshift.contract import compile_contract
from nightshift.formats import Rows
from nightshift.job import Job
from nightshift.money.estimate import BYTES_PER_TOKEN
from nightshift.pictures import Picture
from nightshift.prompts import UNRENDERED, NullInPrompt, Part, Printed, Rendered
from nightshift.providers.forms import form_of
from nightshift.providers.protocol import PICTURES, Form, Question
from nightshift.stores.shards import KEY_BYTES, key_bytes

SYSTEM, USER = "\x00SYSTEM\x00", "\x00USER\x00"  # placeholders that no prompt file can hold: they are control characters
ID, BODY = "\x00", b"\x01"  # placeholders in a line: no JSON holds them
ESCAPES = [(bytes([code]), orjson.dumps(chr(code))[1:-1]) for code in range(0x20)]
APART = b"\xff"  # stands in no UTF-8


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked about one row."""

    key: bytes
    tail: bytes  # of its body, whose head all requests of a job share
    weight: int  # bytes of its line, with a picture counted as the text that costs as much


@dataclass(frozen=True, slots=True)
class Requests:
    """What is asked about a batch of rows."""

    refused: Mapping[int, str]  # why nothing is asked about a row, by its place in the batch
    keys: pa.FixedSizeBinaryArray  # of the other rows, in order
    tails: pa.BinaryArray  # of their bodies
    weights: npt.NDArray[np.int64]  # bytes of their lines, with a picture counted as the text that costs as much


class Encoder:
    """Compiled from a job: turns rows into requests."""

    def __init__(self, job: Job) -> None:
        request, prompt = job.spec.request, job.prompt
        self.form = form_of(request.endpoint)
        parts = {USER: prompt.user}
        system = None
        if prompt.system and prompt.system.variables:
            system, parts[SYSTEM] = SYSTEM, prompt.system
        elif prompt.system:
            system = prompt.system.template.render()
        asked = Question(
            model=request.model,
            system=system,
            user=USER,
            parameters=request.parameters,
            schema=job.answer_schema,
            pictures=request.images is not None,
        )
        pieces, order = _split(_varying_last(self.form.body(asked)))
        template = _compile(pieces, [None if mark == PICTURES else parts[mark] for mark in order])
        self._template = template
        self._rejected = compile_contract(job.spec.input.require)
        opening, middle, closing = _around(self.form)
        self._frame = (opening, middle + template.head, closing)
        self.constant_bytes = sum(map(len, template.constants))  # of what a request has of its own
        self.line_bytes = sum(map(len, self._frame)) + 2 * KEY_BYTES + 1  # of a request's line beside its tail, with the newline
        who = orjson.dumps([request.provider, request.endpoint, request.model])
        if request.images is not None:
            who += orjson.dumps([request.images.longest_side, request.images.format])
        self._seed = hashlib.sha256(who + b"\n" + template.head)
        length = [] if job.dimensions is None else [str(job.dimensions).encode()]  # a vector of another length is another answer
        self.fingerprint = hashlib.sha256(
            who + b"\n".join([*pieces, orjson.dumps(job.answer_schema, option=orjson.OPT_SORT_KEYS), *length])
        ).hexdigest()

    def encode(self, rows: Rows, unasked: Mapping[int, str]) -> Requests:
        """The requests of a batch of rows. `unasked`: why nothing is asked about a row whatever it holds, by its place."""
        texts, refused = self._template.said(rows, self._rejected(rows) | dict(unasked))
        pieces = zip(map(_escaped, texts), self._template.constants, strict=True)
        tails = _joined(*chain.from_iterable(pieces))
        ends = contents(tails)[1]
        keys = b"".join(self._keys(whole(tails), ends.tolist()))
        own = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(tails), [None, pa.py_buffer(keys)])
        return Requests(refused, own, tails, np.diff(ends) + np.int64(self.line_bytes))

    def show(self, row: Mapping[str, Any], pictures: Sequence[Picture]) -> Request | str:
        """The request of a row that shows pictures, or why it is rejected.

        It is known by what the pictures are, not by how an encoder of today has written them.
        """
        rows = Rows(count=1, columns={name: [value] for name, value in row.items()})
        texts, refused = self._template.said(rows, self._rejected(rows))
        if refused:
            return refused[0]
        made = [escaped(whole(text).tobytes()) for text in texts]
        digests = b"".join(picture.digest for picture in pictures)
        shown = b",".join(orjson.dumps(self.form.picture(picture.media_type, picture.base64)) for picture in pictures)
        told, tail = (
            b"".join(chain.from_iterable(zip(values, self._template.constants, strict=True)))
            for values in ([*made[: self._template.slot], here, *made[self._template.slot :]] for here in (digests, shown))
        )
        read = sum(picture.tokens for picture in pictures)
        return Request(next(self._keys(memoryview(told), [0, len(told)])), tail, self.line_bytes + len(told) + int(read * BYTES_PER_TOKEN))

    def lines(self, keys: pa.Array, tails: pa.BinaryArray) -> memoryview:
        """Requests as lines of an input file."""
        opening, middle, closing = self._frame
        ends = np.arange(len(keys) + 1, dtype=np.int32) * 2 * KEY_BYTES
        ids = pa.Array.from_buffers(pa.binary(), len(keys), [None, pa.py_buffer(ends), pa.py_buffer(hexlify(key_bytes(keys)))])
        return whole(_joined(opening, ids, middle, tails, closing + b"\n"))

    def _keys(self, tails: memoryview, ends: Iterable[int]) -> Iterator[bytes]:
        """The keys of the requests whose tails stand between these places: sha256(provider, endpoint, model, body), 32 bytes."""
        seeded = self._seed.copy
        for start, end in pairwise(ends):
            digest = seeded()
            digest.update(tails[start:end])
            yield digest.digest()


Unsaid = str | tuple[str, ...]  # why there is nothing to say, or the columns that are null
Said = tuple[pa.BinaryArray, Mapping[int, Unsaid]]  # in each row, null where there is nothing to say; and why not there, by its place


@dataclass(frozen=True, slots=True)
class BodyTemplate:
    """A body compiled: what all bodies begin with, and the values that each has of its own between constants."""

    head: bytes
    constants: tuple[bytes, ...]  # what follows each value
    values: tuple[Callable[[Rows], Said], ...]
    slot: int  # before which of the values the pictures stand

    def said(self, rows: Rows, refused: Mapping[int, str]) -> tuple[list[pa.BinaryArray], dict[int, str]]:
        """What the values say in the rows that can be asked about, a column each; and why the others cannot, by their place."""
        left = [i for i in range(rows.count) if i not in refused] if refused else range(rows.count)
        asked = rows.at(left) if refused else rows
        said = [value(asked) for value in self.values]
        texts, reasons = [texts for texts, _ in said], [reasons for _, reasons in said]
        unsaid = {i: _why([each[i] for each in reasons if i in each]) for i in dict.fromkeys(chain.from_iterable(reasons))}
        if unsaid:
            is_said = np.ones(asked.count, bool)
            is_said[list(unsaid)] = False
            texts = [column.filter(pa.array(is_said)) for column in texts]
        return texts, {left[i]: why for i, why in unsaid.items()} | dict(refused)


def _why(reasons: Sequence[Unsaid]) -> str:
    """Why a row is rejected of which some values cannot be said."""
    if isinstance(reasons[0], str):
        return f"the prompt cannot be rendered: {reasons[0]}"
    nulls = dict.fromkeys(column for columns in reasons if not isinstance(columns, str) for column in columns)
    return f"the prompt prints a null ({', '.join(nulls) or 'computed'})"


def _compile(pieces: Sequence[bytes], parts: Sequence[Part | None]) -> BodyTemplate:
    """The constant pieces of a body with a part between each two of them; None stands for pictures."""
    constants, values, slot = [pieces[0]], list[Callable[[Rows], Said]](), 0
    for part, after in zip(parts, pieces[1:], strict=True):
        if part is None:
            slot = len(values)
            constants.append(b"")
        for piece in part.pieces if part else ():
            if isinstance(piece, str):
                constants[-1] += escaped(piece.encode())
            else:
                values.append(_printer(piece.column) if isinstance(piece, Printed) else _renderer(piece))
                constants.append(b"")
        constants[-1] += after
    return BodyTemplate(constants[0], tuple(constants[1:]), tuple(values), slot)


def _printer(column: str) -> Callable[[Rows], Said]:
    """Print a column as Jinja2 does."""

    def said(rows: Rows) -> Said:
        array = rows.array(column)
        if array is not None and (pa.types.is_string(array.type) or pa.types.is_integer(array.type)):
            texts = array.cast(pa.string()).cast(pa.binary())
        else:
            texts = pa.array([_printed(value)[0] for value in rows.columns[column]], pa.binary())
        nulls = np.flatnonzero(texts.is_null().to_numpy(zero_copy_only=False)).tolist() if texts.null_count else []
        return texts, {i: _printed(rows.columns[column][i])[1] or (column,) for i in nulls}

    return said


def _printed(value: Any) -> tuple[bytes | None, str]:
    """What a value prints, or why it prints nothing; of a null there is nothing to tell."""
    try:
        return None if value is None else str(value).encode(), ""
    except UNRENDERED as error:
        return None, str(error)


def _renderer(piece: Rendered) -> Callable[[Rows], Said]:
    """Render a piece once for all rows of a batch that hold the same in the columns it reads."""
    render = _render(piece)

    def said(rows: Rows) -> Said:
        distinct, of = _distinct(rows, piece.columns)
        texts, reasons = list[bytes | None](), dict[int, Unsaid]()
        for i, values in enumerate(distinct):
            try:
                text = render(values).encode()
            except NullInPrompt:
                text, reasons[i] = None, tuple(name for name, value in zip(piece.columns, values, strict=True) if value is None)
            except UNRENDERED as error:
                text, reasons[i] = None, str(error.message if isinstance(error, TemplateError) else error)
            texts.append(text)
        made = pa.array(texts, pa.binary())
        if of is None:
            return made, reasons
        unsaid = {i: reasons[group] for i, group in enumerate(of.tolist()) if group in reasons} if reasons else {}
        return made.take(pa.array(of)), unsaid

    return said


def _distinct(rows: Rows, names: Sequence[str]) -> tuple[Iterable[tuple[Any, ...]], npt.NDArray[np.int64] | None]:
    """The values of some columns, row by row; each combination once, where they can be told apart quickly, and which of them a row has."""
    arrays = [array for name in names if (array := rows.array(name)) is not None and _is_plain(array.type)]
    if len(arrays) < len(names):
        return zip(*(rows.columns[name] for name in names), strict=True), None
    of, firsts = np.zeros(rows.count, np.int64), np.zeros(1, np.int64)
    for array in arrays:
        values = array.dictionary_encode(null_encoding="encode")
        numbers = of * len(values.dictionary) + values.indices.to_numpy()
        _, firsts, of = np.unique(numbers, return_index=True, return_inverse=True)
    return zip(*(array.take(pa.array(firsts)).to_pylist() for array in arrays), strict=True), of


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values of a type say the same wherever they are equal. Floats do not: -0.0 is 0.0."""
    return bool(pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _render(piece: Rendered) -> Callable[[Sequence[Any]], str]:
    """Render through the documented context API: several times as fast as `template.render`, same text."""
    template, names, root, concat = piece.template, piece.columns, piece.template.root_render_func, "".join
    if piece.assigns:
        return lambda values: concat(root(template.new_context({**template.globals, **dict(zip(names, values, strict=True))}, shared=True)))
    context = template.new_context({})  # nothing that the template does changes it, so one serves all rows
    known = context.parent

    def render(values: Sequence[Any]) -> str:
        known.update(zip(names, values, strict=True))
        return concat(root(context))

    return render


def escaped(text: bytes) -> bytes:
    """UTF-8 as JSON strings hold it: the bytes of `orjson.dumps` between the quotation marks."""
    text = text.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    codes = np.frombuffer(text, np.uint8)
    for code in np.flatnonzero(np.bincount(codes[codes < len(ESCAPES)])).tolist():
        text = text.replace(*ESCAPES[code])
    return text


def _escaped(texts: pa.BinaryArray) -> pa.BinaryArray:
    """A column escaped at once."""
    apart = whole(_joined(texts, APART)).tobytes()
    data = escaped(apart)
    if len(data) == len(apart):
        return texts
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == APART[0])
    offsets = np.concatenate([[0], ends - np.arange(len(ends))]).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(data.replace(APART, b""))])


def _joined(*pieces: pa.BinaryArray | bytes) -> pa.BinaryArray:
    """Columns and constants, joined row by row."""
    return pc.binary_join_element_wise(*pieces, b"")


def _varying_last(body: Mapping[str, Any]) -> bytes:
    """A body as JSON, with what depends on the row at its end: what stands before is hashed once for all rows."""
    marks = (orjson.dumps(SYSTEM)[1:-1], orjson.dumps(USER)[1:-1], orjson.dumps(PICTURES))
    return orjson.dumps(dict(sorted(body.items(), key=lambda item: any(mark in orjson.dumps(item) for mark in marks))))


def _split(body: bytes) -> tuple[list[bytes], list[str]]:
    """The constant bytes around the placeholders, and the placeholders in the order in which they stand."""
    marks = {orjson.dumps(SYSTEM)[1:-1]: SYSTEM, orjson.dumps(USER)[1:-1]: USER, orjson.dumps(PICTURES): PICTURES}
    found = sorted((body.index(raw), raw, mark) for raw, mark in marks.items() if raw in body)
    pieces, at = [], 0
    for position, raw, _ in found:
        pieces.append(body[at:position])
        at = position + len(raw)
    return [*pieces, body[at:]], [mark for _, _, mark in found]


def _around(form: Form) -> tuple[bytes, bytes, bytes]:
    """What stands before, between and after the id and the body in a line of an input file."""
    opening, rest = form.line(ID, BODY).split(ID.encode())
    middle, closing = rest.split(BODY)
    return opening, middle, closing
