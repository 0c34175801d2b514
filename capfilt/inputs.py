"""List and open inputs: the one module that touches the inputs' storage, on any fsspec URL."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import glob
import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from capfilt.errors import InputError
from capfilt.remedies import remedy
from capfilt.spec import Input
from capfilt.stores import PAUSES, connect, one_line, pause, persist, transient

T = TypeVar("T")

UNSEEN = "unseen"
"""`input_id` of a file that could not be looked at. No file has it, so that nothing read from it is ever committed."""

SUFFIXES = (".parquet", ".tar", ".arrow")
"""Files that a directory is searched for: Parquet, WebDataset's tars, and Arrow streams as Hugging Face saves them."""

_CACHE = re.compile(r"(?:^|/)cache-[^/]*\.arrow$")
"""What Hugging Face's datasets leaves beside saved data: results of `map` and `filter`."""

_LIST = re.compile(r"\.(?:csv|tsv|jsonl|ndjson)(?:\.(?:gz|bz2|xz|zst))?$", re.IGNORECASE)
"""What img2dataset reads, and curation does not."""

_REMOTE_BUFFER = 8 * 2**20
_TAIL = 64 * 2**10

_CONTENT_TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "blob_id", "sha", "generation", "version_id")
_TIME_STAMPS = (
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "modify", "modificationTime"),
    "created",
)


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file, and so one shard.

    Attributes:
        path: absolute local path or URL.
        shard: name of the shard, of [A-Za-z0-9._-]; unique among inputs: the file's stem and a hash of `path`, or of
            the path it had when it was first curated (capfilt.plan).
        input_id: content identity from the listing: the store's ETag or other content tag where it has one, else size
            and modification time (of a symlink's target), else size and a hash of the file's end, its footer. UNSEEN
            where the file is listed and not there, as a symlink to nothing is; reading its footer says why.
        size: bytes.
    """

    path: str
    shard: str
    input_id: str
    size: int


# --- listing ---


def list_inputs(spec: Input, exclude: str | None = None) -> list[InputFile]:
    """List the input files, sorted by path, each path once.

    Directories are searched for files of SUFFIXES at any depth; names that begin with `_` or `.` are left out, as every
    Parquet reader does, and so are `x.parquet` where there is an `x.tar` beside it, which img2dataset writes of a tar,
    and `cache-*.arrow`. A path that exists is taken literally, whatever glob characters it holds. Symlinks to files
    are inputs like others, under their own names; a symlinked directory may be named in the spec, but those found
    below one are not followed. Nothing is read, except the files' ends in a store that stamps its files with nothing.
    A file that is gone before it is looked at is listed still, for the run to name it as a failure of its own.

    Args:
        exclude: a directory whose files are no inputs (the output, should it lie inside an input directory), also
            where a symlink leads there.

    Raises:
        InputError: a path does not exist, matches nothing, or cannot be listed.
    """
    found: dict[str, InputFile] = {}
    for path in spec.paths:
        files = _list_path(path, spec.storage_options)
        if _LIST.search(path):
            raise InputError(
                f"{path}: a list of URLs, by its name, and not their images; fetch them with a spec of `kind: ingest`, "
                "and name its output here"
            )
        if not files:
            raise InputError(
                f"{path}: no Parquet file there, nor a .tar or .arrow; input.paths takes files, globs and directories"
            )
        found.update(files)
    if exclude is not None:
        prefix = _real(exclude).rstrip("/") + "/"
        folders = {posixpath.dirname(path) for path in found}
        inside = {folder for folder in folders if _real(folder + "/").startswith(prefix)}
        found = {path: file for path, file in found.items() if posixpath.dirname(path) not in inside}
    return [found[path] for path in sorted(found)]


def _real(path: str) -> str:
    """A local directory without symlinks, `file://` or not, ending in a slash if `path` does; a URL as it is."""
    if fsspec.utils.get_protocol(path) not in LocalFileSystem.protocol:
        return path
    real = os.path.realpath(str(LocalFileSystem._strip_protocol(path)))
    return real.rstrip("/") + "/" * path.endswith("/")


def _list_path(path: str, options: Mapping[str, Any]) -> dict[str, InputFile]:
    try:
        files = persist(lambda: _look(path, options))
    except InputError:
        raise
    except FileNotFoundError as error:
        if error.__cause__ is not None and remedy(error.__cause__):  # fsspec's, of a web server that did not answer
            raise InputError(f"{path}: cannot be listed: {one_line(error.__cause__)}") from error
        near = _nearest(path)
        if near:
            raise InputError(f"{path}: no such file or directory; did you mean {near}?") from None
        raise InputError(
            f"{path}: no such file or directory; name one that is there (in a spec, relative to the spec's file)"
        ) from None
    except Exception as error:  # every store raises its own kinds
        raise InputError(f"{path}: cannot be listed: {one_line(error)}") from error
    return {file.path: file for file in files}


def _nearest(path: str) -> str | None:
    """What is there by almost that name, of a local path."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.75)
    except OSError:  # no such folder, or a store's URL
        return None
    return os.path.join(folder, near[0]) if near else None


def _look(path: str, options: Mapping[str, Any]) -> list[InputFile]:
    fs, root = connect(path, options)
    fs.invalidate_cache()  # s3fs and others would answer from what they listed before, for ever
    return [_input_file(fs, info, path, root) for info in _find(fs, path, root)]


def _find(fs: Any, path: str, root: str) -> list[Mapping[str, Any]]:
    """What the store says of each file at `path`, whose name in the store is `root`."""
    if is_local(fs) and os.path.isdir(root):
        return _shards([{"name": name} for name in _walk(root)])
    try:
        info = fs.info(root)
        directory = fs.isdir(root) if _is_web(fs) else info["type"] == "directory"
    except FileNotFoundError:
        if not glob.has_magic(path):
            raise
        infos = _glob(fs, root)
    else:
        infos = _shards(_below(fs, root)) if directory else [info]
    infos = [info for info in infos if info["type"] != "directory"]  # which a local link to one is not
    return [info for info in infos if not (is_local(fs) and info["islink"] and os.path.isdir(info["name"]))]


def _shards(infos: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without what is written about a shard, or made of it."""
    tars = {info["name"].removesuffix(".tar") for info in infos if info["name"].endswith(".tar")}
    return [
        info for info in infos if not (info["name"].removesuffix(".parquet") in tars or _CACHE.search(info["name"]))
    ]


def _below(fs: Any, root: str) -> list[Mapping[str, Any]]:
    """Files of SUFFIXES below a store's directory, hidden names left out."""
    # Object stores list a whole prefix at once, and fail if they cannot; fsspec's own search does neither.
    at_once = isinstance(fs, AsyncFileSystem) and type(fs)._find is not AsyncFileSystem._find
    infos = fs.find(root, detail=True).values() if at_once else _tree(fs, root)
    names = ((info["name"], info) for info in infos)
    hidden = re.compile(r"/[._]")
    return [
        info
        for name, info in names
        if name.endswith(SUFFIXES) and not hidden.search(name.removeprefix(root.rstrip("/")))
    ]


def _glob(fs: Any, pattern: str) -> list[Mapping[str, Any]]:
    """Files that match; fsspec's own search takes a folder that it cannot list for one that holds nothing."""
    if _is_web(fs):  # which has an understanding of its own of what `?` is in a URL
        return list(fs.glob(pattern, detail=True).values())
    fixed = pattern[: re.search(r"[*?[]", pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    depth = None if "**" in pattern else pattern.count("/", len(fixed) + 1) + 1
    matches = re.compile(glob_translate(pattern)).match
    return [info for info in _tree(fs, fixed, depth) if matches(info["name"])]


def _tree(fs: Any, root: str, depth: int | None = None) -> Iterator[Mapping[str, Any]]:
    """What lies below a directory, at most `depth` levels deep, directories left out.

    Raises:
        Exception: a directory cannot be listed; but for one that is gone meanwhile.
    """
    folders = [(root, 1)]
    while folders:
        folder, level = folders.pop()
        try:
            infos = fs.ls(folder, detail=True)
        except FileNotFoundError:
            if level == 1:
                raise
            continue
        for info in infos:
            if info["type"] != "directory":
                yield info
            elif (depth is None or level < depth) and info["name"].rstrip("/") != folder.rstrip("/"):
                folders.append((info["name"], level + 1))


def _walk(root: str) -> Iterator[str]:
    """Local files of SUFFIXES below a directory, hidden names left out; fsspec's own search looks at each as well."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a directory removed meanwhile has no files
            raise error

    for folder, below, names in os.walk(root, onerror=fail):
        below[:] = [name for name in below if not name.startswith((".", "_"))]
        for name in names:
            if name.endswith(SUFFIXES) and not name.startswith((".", "_")):
                yield os.path.join(folder, name)


def _input_file(fs: Any, info: Mapping[str, Any], asked: str, root: str) -> InputFile:
    local, name = is_local(fs), info["name"]
    path = name if local else _url(fs, name, asked, root)
    stem, suffix = posixpath.splitext(posixpath.basename(name))
    title = re.sub(r"[^A-Za-z0-9._-]+", "_", stem if suffix in SUFFIXES else stem + suffix)[:60]
    digest = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    shard = f"{title}-{digest}"
    try:
        if local:
            info = _stat(name)
        elif _stamp(info) is None:  # a web server's index says less than its answer for one file
            info = fs.info(name)
        return InputFile(path, shard, _identity(fs, name, info), int(info["size"] or 0))
    except OSError as error:
        if not (local or isinstance(error, FileNotFoundError)):
            raise
        return InputFile(path, shard, UNSEEN, 0)


def stem(shard: str) -> str:
    """What a shard's name has of its file's name, whatever the directory."""
    return shard.rpartition("-")[0]


def _url(fs: Any, name: str, asked: str, root: str) -> str:
    """URL of file `name`, found under URL `asked` whose own name is `root`, such that it opens in the same store.

    Some names lack what the URL says of the store, as FTP's and HDFS's lack the host; then it is taken from `asked`.
    """
    url: str = fs.unstrip_protocol(name)
    if fs._get_kwargs_from_urls(url) == fs._get_kwargs_from_urls(asked):
        return url
    asked, root = asked.rstrip("/"), root.rstrip("/")
    common = len(posixpath.commonprefix([asked[::-1], root[::-1]]))  # asked = A + common, root = R + common
    return asked[: len(asked) - common] + name.removeprefix(root[: len(root) - common])


def _stat(name: str) -> dict[str, Any]:
    """Size and time of a local file, of its target where it is a symlink."""
    stat = os.stat(name)  # noqa: PTH116  making a Path costs as much as the look
    return {"size": stat.st_size, "mtime": stat.st_mtime}


def _stamp(info: Mapping[str, Any]) -> Any:
    return next((info[key] for key in (*_CONTENT_TAGS, *_TIME_STAMPS) if info.get(key)), None)


def _identity(fs: Any, name: str, info: Mapping[str, Any]) -> str:
    """Content identity of a listed file, at most 64 characters."""
    for tag in _CONTENT_TAGS:
        if info.get(tag):
            return str(info[tag]).strip('"')[:64]
    stamp = _stamp(info)
    if stamp is None:
        stamp = hashlib.blake2b(fs.tail(name, _TAIL), digest_size=16).hexdigest()
    if isinstance(stamp, datetime.datetime):  # a listing and a look at one file may differ in form
        stamp = stamp.timestamp()
    moment = f"{stamp:.6f}" if isinstance(stamp, float) else str(stamp)
    return f"{info['size']}-{moment}"[:64]


def renew(path: str) -> str:
    """What a person does to have an input file curated from the start: under its name, give it another identity.

    Under another name its shard would be a new one, beside the one there is. A store's ETag may be a hash of the bytes,
    as S3's is, so that the same bytes written again change nothing.
    """
    if "://" in path:
        return f"Write {path} anew with other bytes (its rows in another compression, say) to curate it anew"
    return f"Touch {path} to curate it anew"


def is_local(fs: Any) -> bool:
    return "file" in _protocols(fs)


def _is_web(fs: Any) -> bool:
    return "http" in _protocols(fs)


def _protocols(fs: Any) -> Sequence[str]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol


# --- opening ---


class _Watched:
    """A store's file for reading that keeps the last error of its own.

    Arrow passes a store's errors on in many forms; this tells a store that fails from pages that are corrupt.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.failed: Exception | None = None

    def _watch(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            self.failed = error
            raise

    def read(self, size: int = -1) -> bytes:
        answer: bytes = self._watch(self._file.read, size)
        return answer

    def seek(self, offset: int, whence: int = 0) -> int:
        answer: int = self._watch(self._file.seek, offset, whence)
        return answer

    def tell(self) -> int:
        answer: int = self._watch(self._file.tell)
        return answer

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()


class Opened:
    """A file of one store, closed on exit; entered as a pq.ParquetFile or, if `plain`, as what seeks and reads bytes.

    Attributes:
        failed: the error of a store that failed to open or read the file; None for a local file, and for one that is
            readable but wrong.
    """

    def __init__(self, path: str, options: Mapping[str, Any], *, plain: bool = False) -> None:
        self.path, self.options, self._plain = path, options, plain
        self._handle: Any = None
        self._unopened: Exception | None = None

    @property
    def failed(self) -> Exception | None:
        return self._unopened or getattr(self._handle, "failed", None)

    def __enter__(self) -> Any:
        """Raises InputError for what is no Parquet file, and for a store that fails; MemoryError."""
        try:
            buffer = self._open()
            if self._plain:
                return self._handle
            return pq.ParquetFile(self._handle, buffer_size=buffer, pre_buffer=False)
        except MemoryError:
            self.__exit__()
            raise
        except Exception as error:  # every store raises its own kinds
            self.__exit__()
            unread = self.failed or (isinstance(error, OSError) and error.errno is not None)
            what = "cannot be read" if unread or self._plain else "not readable as Parquet"
            mend = "" if unread or self._plain else "; mend the file, or take it out of the input"
            raise InputError(f"{self.path}: {what}: {one_line(error)}{mend}") from error

    def _open(self) -> int:
        """Open the handle; returns the buffer to read it with, in bytes."""
        try:
            fs, name = connect(self.path, self.options)
            if not is_local(fs):
                self._handle = _Watched(fs.open(name, "rb", block_size=_REMOTE_BUFFER))
                return _REMOTE_BUFFER
        except Exception as error:
            self._unopened = error
            raise
        self._handle = pa.OSFile(name, "rb")
        return 2**20

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            with contextlib.suppress(Exception):  # nothing of a file read is lost by it
                self._handle.close()


def read_parquet(
    path: str, options: Mapping[str, Any], read: Callable[[pq.ParquetFile], T], pauses: Sequence[float] = PAUSES
) -> T:
    """What `read` makes of a Parquet file; as :func:`read_file`."""
    return read_file(path, options, read, pauses, plain=False)


def read_file(
    path: str,
    options: Mapping[str, Any],
    read: Callable[[Any], T],
    pauses: Sequence[float] = PAUSES,
    *,
    plain: bool = True,
) -> T:
    """What `read` makes of a file, opened and read anew where its store fails.

    A store whose failure will not pass (capfilt.stores.transient) is not asked again: it may list what it lets no one
    read.

    Args:
        pauses: seconds to wait before each further try.
        plain: see :class:`Opened`.

    Raises:
        InputError: the file is not Parquet or cannot be decoded, or its store keeps failing; or `read` raises it.
        MemoryError: there is no memory to read into; the file is not to blame.
    """
    for seconds in (*pauses, None):
        opened = Opened(path, options, plain=plain)
        try:
            with opened as file:
                return read(file)
        except MemoryError:  # Arrow's own is one, too
            raise
        except Exception as error:  # every store raises its own kinds
            failed = opened.failed
            if seconds is None or failed is None or not transient(failed):
                if isinstance(error, InputError) or not (failed or isinstance(error, (pa.ArrowException, OSError))):
                    raise
                raise InputError(f"{path}: cannot be read: {one_line(failed or error)}") from error
        pause(seconds)
    raise AssertionError("the last try returns or raises")


def current_identity(file: InputFile, options: Mapping[str, Any], pauses: Sequence[float] = PAUSES) -> str:
    """The file's content identity now, to compare with `file.input_id`.

    Args:
        pauses: seconds to wait before each further try at a store that fails.

    Raises:
        InputError: the file is gone or its store does not answer.
    """

    def look() -> str:
        fs, name = connect(file.path, options)
        fs.invalidate_cache()
        return _identity(fs, name, _stat(name) if is_local(fs) else fs.info(name))

    try:
        return persist(look, pauses)
    except MemoryError:
        raise
    except Exception as error:  # every store raises its own kinds
        raise InputError(f"{file.path}: cannot be read any more: {one_line(error)}") from error
