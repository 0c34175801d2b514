"""WebDataset tars: files side by side whose names are alike up to the first dot are a sample.

Only headers are read to find the samples. Names are keys, never paths; nothing is extracted, nothing is unpickled;
members of other kinds than images, text and JSON are left where they are.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Extensions, by preference."""

RUN_ROWS = 1000
"""Samples from one offset that is kept to the next: a fragment that begins between two skips headers from the first."""

_BLOCK = 512
_LARGEST_NAME = 2**20
_LARGEST_TEXT = 2**20
_LARGEST_IMAGE = 2**31 - 1
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class BrokenTarError(OSError):
    """A tar that does not go on as tars do; what it held before is good.

    Attributes:
        member: the name of the file in the midst of which that is; None between files.
    """

    member: str | None = None

    @classmethod
    def within(cls, member: str, size: int) -> BrokenTarError:
        """Of a tar of `size` bytes that ends in a file."""
        error = cls(f"the tar ends at byte {size:,}, in the middle of {member[:200]!r}")
        error.member = member
        return error


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class Sample:
    """Members of one key, by extension in lower case; `offset` is that of the first one's header."""

    key: str
    offset: int
    members: dict[str, Member] = field(default_factory=dict)


# --- headers ---


def members(file: Any, offset: int, size: int) -> Iterator[tuple[int, Member]]:
    """(offset of its header, member) of each regular file from `offset` on.

    Args:
        file: seeks and reads.
        size: of the file, in bytes.

    Raises:
        BrokenTarError: the tar ends, or is no tar any more, before its end mark; after all members that are whole.
    """
    begin, name, ended = offset, None, False
    while True:
        file.seek(offset)
        block = file.read(_BLOCK)
        if not block and ended:
            return
        if len(block) < _BLOCK:
            raise BrokenTarError(
                f"the tar ends at byte {size:,} without an end mark: it was cut off, or never finished"
            )
        if not any(block):
            offset, ended = offset + _BLOCK, True
            begin = offset
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError as error:
            if ended:  # whatever stands behind the end mark
                return
            raise BrokenTarError(f"no tar header at byte {offset:,} ({error})") from None
        data, length = offset + _BLOCK, header.size
        if length < 0 or header.type == tarfile.GNUTYPE_SPARSE:
            raise BrokenTarError(f"a sparse file, or one of a negative size, at byte {offset:,}")
        if data + length > size:
            raise BrokenTarError.within(name or header.name, size)
        if header.type in _NAMING:
            if length > _LARGEST_NAME:
                raise BrokenTarError(f"a name of {length:,} bytes at byte {offset:,}")
            name = _long_name(file.read(length), header.type, name)
        offset = data + -(-length // _BLOCK) * _BLOCK
        if header.isreg():
            yield begin, Member(name or header.name, data, length)
        if header.type not in (*_NAMING, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            begin, name = offset, None


_NAMING = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
"""Headers that say more of the member that follows, its name among it."""


def _long_name(data: bytes, kind: bytes, name: str | None) -> str | None:
    """The name that a header before a member gives it.

    Raises:
        BrokenTarError: it changes the member's size, as only files of 8 GiB need.
    """
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "replace")
    while data:
        length = data.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path":
            name = value.decode("utf-8", "replace")
        elif keyword == b"size" or keyword.startswith(b"GNU.sparse"):
            raise BrokenTarError("a sparse file, or one of 8 GiB or more")
        data = data[int(length) :]
    return name


# --- samples ---


def samples(file: Any, offset: int, size: int) -> Iterator[Sample]:
    """Samples from `offset` on, which is where one begins; arguments and errors as those of :func:`members`.

    A second member of one extension begins another sample, of the same key.

    Raises:
        BrokenTarError: after all samples before it. One that broke off in the middle of a file is not among them.
    """
    sample: Sample | None = None
    try:
        for begin, member in members(file, offset, size):
            named = _NAME.fullmatch(member.name)
            if named is None:  # without an extension, or hidden
                continue
            key, extension = named[1], named[2].lower()
            if sample is None or sample.key != key or extension in sample.members:
                if sample is not None:
                    yield sample
                sample = Sample(key, begin)
            sample.members[extension] = member
    except BrokenTarError as error:
        named = _NAME.fullmatch(error.member or "")
        if sample is not None and (named is None or named[1] != sample.key):
            yield sample
        raise
    if sample is not None:
        yield sample


@dataclass(frozen=True, slots=True)
class Index:
    """What the headers of a tar say.

    Attributes:
        rows: of each run of RUN_ROWS samples, the last one's fewer. A tar that is broken has one row more, for what is
            lost: how many it was no one can tell.
        offsets: where each run begins.
        scattered: a key whose image and text lie apart, as no reader of WebDatasets puts them together.
    """

    rows: tuple[int, ...]
    offsets: tuple[int, ...]
    scattered: str | None


def index(file: Any, size: int, images: Sequence[str]) -> Index:
    """Find all samples.

    Args:
        images: extensions of images.

    Raises:
        BrokenTarError: it is no tar at all.
    """
    offsets: list[int] = []
    count = 0
    bare: dict[bool, set[str]] = {True: set(), False: set()}  # keys of samples of an image alone, or without one
    try:
        for sample in samples(file, 0, size):
            if count % RUN_ROWS == 0:
                offsets.append(sample.offset)
            count += 1
            pictured = any(name in sample.members for name in images)
            if not pictured or len(sample.members) == 1:
                bare[pictured].add(sample.key)
    except BrokenTarError:
        if not count:
            raise
        count += 1
        if count % RUN_ROWS == 1:
            offsets.append(size)
    rows = [min(RUN_ROWS, count - start) for start in range(0, count, RUN_ROWS)]
    return Index(tuple(rows), tuple(offsets), min(bare[True] & bare[False], default=None))


@dataclass(frozen=True, slots=True)
class Contents:
    """What a sample holds; `problem` is why it cannot be used."""

    image: bytes | None
    text: str | None
    fields: Mapping[str, Any]
    problem: str | None = None


def contents(file: Any, sample: Sample, images: Sequence[str], texts: Sequence[str]) -> Contents:
    """Read a sample's image, text and JSON.

    Args:
        images: extensions, the first that is there is taken.
        texts: extensions, or fields of the JSON.
    """
    image = next((sample.members[name] for name in images if name in sample.members), None)
    text = next((sample.members[name] for name in texts if name in sample.members), None)
    about = sample.members.get("json")
    for member, most in ((image, _LARGEST_IMAGE), (text, _LARGEST_TEXT), (about, _LARGEST_TEXT)):
        if member is not None and member.size > most:
            return Contents(None, None, {}, f"{member.name[:200]!r} has {member.size:,} bytes")
    fields: Any = {}
    problem = None
    if about is not None:
        try:
            fields = json.loads(_read(file, about))
        except (ValueError, RecursionError) as error:
            problem = f"{about.name[:200]!r} is no JSON: {error}"[:1000]
        if not isinstance(fields, dict):
            fields = {}
    words: str | None
    if text is not None:
        words = _read(file, text).decode("utf-8", "replace")
    else:
        words = next((fields[name] for name in texts if isinstance(fields.get(name), str)), None)
        if words is None and problem is not None:
            return Contents(None, None, {}, problem)
    return Contents(None if image is None else _read(file, image), words, fields)


def _read(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    data: bytes = file.read(member.size)
    if len(data) < member.size:
        raise BrokenTarError(f"{member.name[:200]!r} ends after {len(data):,} of {member.size:,} bytes")
    return data
