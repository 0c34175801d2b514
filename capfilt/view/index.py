"""The search index of a dataset: what a search asks of every row, in one DuckDB file of this machine's cache.

A search over nested texts in thousands of Parquet files takes minutes; over the index's narrow columns, of millions of
rows, half a second. A row itself is then read from its table. The index is by data file, which never changes, so that
what two versions share is indexed once and a recuration costs its own files; what no opened version names is taken out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from capfilt.errors import DatasetError
from capfilt.redaction import redacted
from capfilt.schema import SHARD
from capfilt.stores import PAUSES, one_line, persist

_FORMAT = f"capfilt view 2, DuckDB {duckdb.__version__}"  # whose hash of an outcome is on record

_FILES_AT_ONCE = 256
_MEMORY = "1GiB"
_REMOTE_THREADS = 16  # which wait for a store

_TABLES = f"""
    CREATE TABLE about AS SELECT '{_FORMAT}' AS format;
    CREATE TABLE files (number INTEGER, url VARCHAR, shard VARCHAR);
    CREATE TABLE opened (url VARCHAR, newer BOOLEAN, older BOOLEAN);
    CREATE TABLE rows (
        id BIGINT, file INTEGER, row BIGINT, status VARCHAR, reason VARCHAR, text_reasons VARCHAR,
        web FLOAT, synthetic FLOAT, kept_web BOOLEAN, kept_synthetic BOOLEAN, outcome UBIGINT,
        texts UBIGINT, text VARCHAR, url VARCHAR
    );
    CREATE TABLE changes (id BIGINT, newer BIGINT, older BIGINT, outcome BOOLEAN);
"""
# opened: the files of the versions that are looked at, the newer and the older one.
# id: the file's number and the place in the file, so that it orders the rows as the tables have them.
# web, synthetic: ITM scores of the web's text, and of the best synthetic one.
# outcome: of two rows the same where their status, reason and kept texts are; texts: where all texts, what became of
# them and every score are.
# changes: of a row's outcome between the versions; or of its texts alone.

_INSERT = """
    INSERT INTO rows
    SELECT
        number::BIGINT << 32 | file_row_number,
        number,
        row,
        status,
        reason,
        '|' || array_to_string(list_distinct(list_transform(texts, lambda t: t.reason)), '|') || '|',
        list_filter(texts, lambda t: t.source = 'web')[1].itm,
        list_max(list_transform(list_filter(texts, lambda t: t.source <> 'web'), lambda t: t.itm)),
        len(list_filter(texts, lambda t: t.source = 'web' AND t.kept)) > 0,
        len(list_filter(texts, lambda t: t.source <> 'web' AND t.kept)) > 0,
        hash(status, reason, list_transform(list_filter(texts, lambda t: t.kept), lambda t: t.text)),
        hash(texts),
        lower(array_to_string(list_transform(texts, lambda t: t.text), chr(10))),
        lower(read.url)
    FROM read_parquet($urls, filename = true, file_row_number = true, hive_partitioning = false) AS read
    JOIN files ON files.url = read.filename
"""

_COMPARE = """
    INSERT INTO changes
    WITH all_rows AS (
        SELECT shard, row, id, outcome, texts, newer, older
        FROM rows JOIN files ON number = file JOIN opened ON opened.url = files.url
        WHERE newer <> older
    )
    SELECT coalesce(n.id, o.id), n.id, o.id, n.outcome IS DISTINCT FROM o.outcome
    FROM (FROM all_rows WHERE newer) AS n FULL JOIN (FROM all_rows WHERE older) AS o USING (shard, row)
    WHERE n.id IS NULL OR o.id IS NULL OR n.outcome <> o.outcome OR n.texts <> o.texts
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the index is.

    Attributes:
        files, of: data files indexed, and to be.
        compared: whether the rows that two versions differ in are known.
        failed: why it came no further; None while it goes on.
    """

    files: int
    of: int
    compared: bool
    failed: str | None

    @property
    def done(self) -> bool:
        """Whether every row can be found."""
        return self.files == self.of


class Index:
    """The index of a version of the annotations, and of an older one to compare it with.

    Args:
        path: the DuckDB file, which only one process can have open; made where it is not there.
        newer: URLs of the data files that hold the version.
        older: of the other one; None where nothing is compared.
        filesystem: fsspec's, where the files are not local.

    Raises:
        DatasetError: another process has the file, or it is no index.
    """

    def __init__(
        self, path: str, newer: Sequence[str], older: Sequence[str] | None = None, filesystem: Any = None
    ) -> None:
        self.path, self.compares = path, older is not None
        self._connection = _open(path)
        self._remote = filesystem is not None
        if self._remote:
            self._connection.register_filesystem(filesystem)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._building: duckdb.DuckDBPyConnection | None = None
        self._failed: str | None = None
        self._compared = False
        self._of = len({*newer, *(older or ())})
        self._missing = self._settle(set(newer), set(older or ()))

    def _settle(self, newer: set[str], older: set[str]) -> list[str]:
        """Take out what is not looked at any more. The files that are missing, in order."""
        urls = sorted(newer | older)
        opened = {"urls": urls, "newer": [url in newer for url in urls], "older": [url in older for url in urls]}
        with self.cursor() as cursor, _transaction(cursor):
            cursor.execute("DELETE FROM opened")
            cursor.execute("INSERT INTO opened SELECT unnest($urls), unnest($newer), unnest($older)", opened)
            gone = "SELECT number FROM files WHERE url NOT IN (SELECT url FROM opened)"
            cursor.execute(f"DELETE FROM rows WHERE file IN ({gone})")
            cursor.execute(f"DELETE FROM files WHERE number IN ({gone})")
            cursor.execute("DELETE FROM changes")
            there = {url for (url,) in cursor.execute("SELECT url FROM files").fetchall()}
        return [url for url in urls if url not in there]

    def build(self) -> None:
        """Index what is missing, and compare; in the background. What is indexed can be searched already."""
        self._thread = threading.Thread(target=self._build, name="index", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """For the end of :meth:`build`.

        Raises:
            DatasetError: it failed.
        """
        if self._thread:
            self._thread.join()
        if self._failed:
            raise DatasetError(self._failed)

    def _build(self) -> None:
        try:
            with self.cursor() as cursor:
                self._building = cursor
                if self._remote:
                    cursor.execute(f"SET threads = {_REMOTE_THREADS}")
                while self._missing and not self._stopped.is_set():
                    add = partial(self._add, cursor, self._missing[:_FILES_AT_ONCE])
                    persist(add, PAUSES if self._remote else ())
                    self._missing = self._missing[_FILES_AT_ONCE:]
                if self._stopped.is_set():
                    return
                if self.compares:
                    cursor.execute(_COMPARE)
                    self._compared = True
                cursor.execute("CHECKPOINT")
                cursor.execute("RESET threads")
                cursor.execute("SET enable_external_access = false")  # nothing but the index is read from now on
        except Exception as error:  # noqa: BLE001  told to whoever looks
            if not self._stopped.is_set():
                self._failed = redacted(
                    f"the index stops at {self._of - len(self._missing):,} of {self._of:,} files: {one_line(error)}. "
                    "Mend the cause and start again; if a vacuum took the version's files, look at a newer one"
                )

    def _add(self, cursor: duckdb.DuckDBPyConnection, urls: Sequence[str]) -> None:
        with _transaction(cursor):
            ((first,),) = cursor.execute("SELECT coalesce(max(number) + 1, 0) FROM files").fetchall()
            files = {"numbers": list(range(first, first + len(urls))), "urls": urls, "shards": list(map(_shard, urls))}
            cursor.execute("INSERT INTO files SELECT unnest($numbers), unnest($urls), unnest($shards)", files)
            cursor.execute(_INSERT, {"urls": urls})

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self._of - len(self._missing), self._of, self._compared, self._failed)

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of the caller's own, to close; another thread may interrupt it."""
        with self._lock:
            return self._connection.cursor()

    def close(self) -> None:
        """Stop building, and close the file. What was indexed stays for the next time."""
        self._stopped.set()
        while self._thread and self._thread.is_alive():
            if self._building:
                self._building.interrupt()
            self._thread.join(timeout=0.1)
        self._connection.close()


def default_path(output: str) -> str:
    """Where the index of an output lies: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.blake2b(output.encode(), digest_size=8).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", output.rstrip("/").rpartition("/")[2])[:60]
    return f"{cache}/capfilt/view/{name}-{digest}.duckdb"


def _open(path: str) -> duckdb.DuckDBPyConnection:
    """Open an index, made anew where another version of this program or of DuckDB made it."""
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": _MEMORY,
        "temp_directory": f"{path}.tmp",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
    }
    try:
        connection = duckdb.connect(path, config=settings)
        tables = {name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
        if not tables:
            Path(path).chmod(0o600)
            connection.execute(_TABLES)
        elif not tables >= {"about", "rows"}:
            raise DatasetError(f"{path}: a database, but no search index of capfilt; give another name with --index")
        elif connection.execute("SELECT format FROM about").fetchall() != [(_FORMAT,)]:
            for name in tables:
                connection.execute(f'DROP TABLE "{name}"')
            connection.execute(_TABLES)
    except duckdb.Error as error:
        if "lock" in str(error).lower():
            raise DatasetError(
                f"{path}: in use by another `capfilt view` of this output; end it, or give one of the two another file "
                "with --index"
            ) from error
        raise DatasetError(
            f"{path}: not readable as a search index: {one_line(error)}. If it is one, delete it: it is made anew"
        ) from error
    return connection


@contextlib.contextmanager
def _transaction(cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
    cursor.execute("BEGIN")
    try:
        yield
    except BaseException:
        cursor.execute("ROLLBACK")
        raise
    cursor.execute("COMMIT")


def _shard(url: str) -> str:
    return url.rsplit("/", 2)[-2].removeprefix(f"{SHARD}=")
