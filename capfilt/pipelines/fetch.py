"""One shard, fetched by img2dataset: what runs in a process of its own, or in a Ray task.

img2dataset's downloader, resizer and choice of columns are used as they are. What is ours: the opener behind its
downloads (capfilt.opener), a look at what came before OpenCV decodes it, and the writer, which accounts for every row
of the shard. It imports neither torch nor ray, and img2dataset only once it runs.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.account import SUCCESS, Account, kind_of_error
from capfilt.errors import CapfiltError, ImageError
from capfilt.images import look
from capfilt.opener import EVERYWHERE, Limits, Opener, goes_through, installed
from capfilt.pipelines.job import Failure
from capfilt.shard_store import ACCOUNT, ATTEMPTS, Store
from capfilt.spec import Images, IngestSpec
from capfilt.stores import blamed
from capfilt.url_shards import Shard, ShardName

NO_DOWNLOAD, NO_IMAGE = "failed_to_download", "failed_to_resize"
"""img2dataset's own statuses, beside success."""

KILLED = "killed the process that fetched it"

_ROW_GROUP_BYTES = 8 * 2**20
_ROW_GROUP_ROWS = 1000
_FILES_PER_NAME = 5  # digits of a shard's number in a key, of which there is only 0

_ENVIRONMENT = {
    "NO_ALBUMENTATIONS_UPDATE": "1",  # it would ask the web for its newest version
    "WANDB_MODE": "disabled",
}


@dataclass(frozen=True)
class Task:
    """A shard to fetch.

    Attributes:
        deaths: of processes that fetched it.
        fatal: record its rows as what killed them; fetch nothing.
    """

    shard: Shard
    deaths: int = 0
    fatal: bool = False


@dataclass(frozen=True)
class Fetched:
    """A shard that is in the output now."""

    name: ShardName
    account: Account
    bytes: int
    seconds: float


def attempt(spec: IngestSpec, task: Task) -> Fetched | Failure:
    """Fetch a shard and put it into the output. What goes wrong is handed back, to be raised where the run is."""
    try:
        return fetch(spec, task.shard, task.fatal)
    except Exception as error:  # noqa: BLE001 - handed back
        return Failure.of(error, str(task.shard.name))


def fetch(spec: IngestSpec, shard: Shard, fatal: bool = False) -> Fetched:
    """As :func:`attempt`.

    Raises:
        CapfiltError: img2dataset is not there, or not one whose connections can be checked.
        StoreError: the output cannot be written.
    """
    begin = time.monotonic()
    store = Store(spec.output, spec.output_options)
    with _attempt(store) as folder:
        path = f"{folder}/shard.parquet"
        if fatal:
            writer = Writer(path, spec, shard, _schema(spec, shard))
            writer.close(NO_IMAGE, KILLED)
        else:
            writer = _download(spec, shard, folder, path)
        size = os.path.getsize(path)
        store.publish(path, shard.name)
    return Fetched(shard.name, writer.account, size, time.monotonic() - begin)


@contextmanager
def _attempt(store: Store) -> Iterator[str]:
    """A folder of this attempt's own, gone at its end: in the output, where a file can be moved into place from."""
    if store.local:
        folder = f"{store.root}/{ATTEMPTS}/{uuid.uuid4().hex}"
        with blamed(f"{store.output}: cannot be written"):
            os.makedirs(folder)
    else:
        folder = tempfile.mkdtemp(prefix="capfilt-ingest-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- img2dataset ---


@cache
def library() -> tuple[Any, Any]:
    """img2dataset's Downloader and Resizer.

    Raises:
        CapfiltError: it is not installed, or downloads in a way that the opener does not see.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports
            from img2dataset import downloader, resizer
    except ImportError as error:
        raise CapfiltError(f"ingest needs img2dataset ({error}): pip install 'capfilt[ingest]'") from error
    if not goes_through(lambda url: downloader.download_image((0, url), 1.0, None, None)[2]):
        raise CapfiltError(
            f"img2dataset {version('img2dataset')} does not download by urllib.request.urlopen, so that where it "
            "connects to cannot be checked; install the one of constraints.txt"
        )
    return downloader.Downloader, resizer.Resizer


def _download(spec: IngestSpec, shard: Shard, folder: str, path: str) -> Writer:
    make_downloader, make_resizer = library()
    download, resize = spec.download, spec.resize
    writers: list[Writer] = []

    def make_writer(*arguments: Any) -> Writer:  # as img2dataset calls it
        writers.append(Writer(path, spec, shard, arguments[4]))
        return writers[0]

    resizer = make_resizer(
        **resize.model_dump(exclude={"max_pixels", "max_image_area", "max_aspect_ratio"}),
        max_image_area=resize.max_image_area or float("inf"),
        max_aspect_ratio=resize.max_aspect_ratio or float("inf"),
    )
    downloader = make_downloader(
        sample_writer_class=make_writer,
        resizer=Checked(resizer, Images(max_pixels=resize.max_pixels, max_bytes=download.max_bytes)),
        thread_count=min(download.thread_count, shard.name.rows),
        save_caption=True,
        extract_exif=download.extract_exif,
        output_folder=folder,
        column_list=shard.table.column_names,
        timeout=download.timeout,
        number_sample_per_shard=shard.name.rows,
        oom_shard_count=_FILES_PER_NAME,
        compute_hash=download.compute_hash,
        verify_hash_type=download.compute_hash if spec.urls.verify_hash_col else None,
        encode_format=resize.encode_format,
        retries=download.retries,
        user_agent_token=download.user_agent_token,
        disallowed_header_directives=download.disallowed_header_directives or None,
    )
    rows = f"{folder}/rows.arrow"
    with blamed(f"{spec.output}: cannot be written"), pa.ipc.new_file(rows, shard.table.schema) as sink:
        sink.write_table(shard.table)
    allowed = download.allow_private
    networks = allowed if isinstance(allowed, tuple) else EVERYWHERE if allowed else ()
    limits = Limits(download.timeout, download.total_timeout, download.max_bytes, networks)
    with installed(Opener(limits)):
        downloader.download_shard((0, rows))
    return writers[0]


class Checked:
    """img2dataset's resizer, given only what is an image by its first bytes, of a size within bounds by its header."""

    def __init__(self, resizer: Any, limits: Images) -> None:
        self._resizer, self._limits = resizer, limits

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: Any = None) -> tuple[Any, ...]:
        """(bytes, width, height, original width, original height, what is wrong), as img2dataset has it."""
        try:
            _, width, height = look(img_stream.getvalue(), self._limits)
        except ImageError as error:
            return None, None, None, None, None, str(error)
        img_stream.seek(0)
        stored, *sizes, error_message = self._resizer(img_stream, blurring_bbox_list)
        if stored is not None and sizes[0] is None:  # kept as it came, unread
            sizes = [width, height, width, height]
        return stored, *sizes, error_message


# --- writing ---


def _schema(spec: IngestSpec, shard: Shard) -> pa.Schema:
    """The columns of a shard that img2dataset was not asked for, as it would have them."""
    texts, numbers = ("key", "status", "error_message"), ("width", "height", "original_width", "original_height")
    fields = [pa.field(name, pa.string()) for name in texts] + [pa.field(name, pa.int32()) for name in numbers]
    more = ["exif"] if spec.download.extract_exif else []
    kind = spec.download.compute_hash
    more += [kind] if kind and kind not in shard.table.column_names else []
    return pa.schema([*shard.table.schema, *fields, *(pa.field(name, pa.string()) for name in more)])


class Writer:
    """Writes a shard's rows as they come, and at the end those that never came: as many rows as URLs, whatever happens.

    Args:
        path: of a local file.
        schema: without the image column.

    Attributes:
        account: of the rows that are written.
    """

    def __init__(self, path: str, spec: IngestSpec, shard: Shard, schema: pa.Schema) -> None:
        self._image, self._hash = spec.resize.encode_format, spec.download.compute_hash
        self._schema = schema.append(pa.field(self._image, pa.binary()))
        self._shard = shard
        self._missing = set(range(shard.name.rows))
        self._pending: list[Mapping[str, Any]] = []
        self._pending_bytes = 0
        self._failed: Exception | None = None
        self._what = f"{spec.output}: cannot be written"
        self.account = Account()
        with blamed(self._what):
            self._writer = pq.ParquetWriter(
                path,
                self._schema,
                compression={name: "none" if name == self._image else "zstd" for name in self._schema.names},
                use_dictionary=["status", "error_message"],
                write_statistics=["status"],
            )

    def write(self, image: bytes | None, key: str, _caption: str | None, meta: Mapping[str, Any]) -> None:
        """Add a row; called by img2dataset, which takes any error for the row's: it is raised at the end, too."""
        if self._failed:  # what follows is in vain, and would pile up
            return
        try:
            self._add(int(key), {**meta, self._image: image})
        except Exception as error:
            self._failed = error
            raise

    def _add(self, position: int, row: dict[str, Any]) -> None:
        self._missing.remove(position)
        name = self._shard.name
        row["key"] = f"{name.digest[:16]}-{name.copy}-{position:06d}"
        self.account.statuses[row["status"]] += 1
        if row["status"] != SUCCESS:
            self.account.errors[kind_of_error(row["error_message"] or "")] += 1
        self._pending.append(row)
        self._pending_bytes += len(row[self._image] or b"")
        if self._pending_bytes >= _ROW_GROUP_BYTES or len(self._pending) >= _ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = [pa.array([row[name] for row in self._pending], kind) for name, kind in _fields(self._schema)]
        with blamed(self._what):
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._pending, self._pending_bytes = [], 0

    def close(self, status: str = NO_DOWNLOAD, message: str = "img2dataset gave no answer for it") -> None:
        """Add what is missing as failures, and finish the file.

        Raises:
            StoreError: the file cannot be written, or could not be before.
        """
        if self._failed:
            raise self._failed
        for position in sorted(self._missing):
            row = dict.fromkeys(self._schema.names) | self._shard.table.slice(position, 1).to_pylist()[0]
            if self._hash:
                row[self._hash] = None  # what a list says of an image is not the image's
            self._add(position, row | {"status": status, "error_message": message})
        self._flush()
        self._writer.add_key_value_metadata({ACCOUNT: self.account.to_json()})
        with blamed(self._what):
            self._writer.close()


def _fields(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    return zip(schema.names, schema.types, strict=True)
