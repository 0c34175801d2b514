"""What libraries say of their errors, as it is passed on."""

from __future__ import annotations

import pytest
from deltalake.exceptions import DeltaError
from pyarrow.lib import ArrowInvalid

from capfilt.causes import said

BACKTRACE = """Kernel error: Json error: Truncated record whilst reading string
   0: <unknown>
   1: core::ops::function::FnOnce::call_once
             at /rustc/0123/library/core/src/ops/function.rs:250:5
  12: start_thread
             at ./nptl/pthread_create.c:442:8
  13: clone3
             at ./misc/../sysdeps/unix/sysv/linux/x86_64/clone3.S:81:0
"""
GAP = (
    "Kernel error: Generic delta kernel error: Expected contiguous commit files, but found gap: ParsedLogPath { "
    'location: FileMeta { location: Url { scheme: "file", path: "/n/2.json", host: None }, size: 17454 }, v: 2 }'
)
LOST = "[Errno 2] Failed to open local file '/n/shard=7/0.parquet'. Detail: [errno 2] No such file or directory"
STREAM = (
    "Invalid Input Error: reading the stream registered as 'annotations' failed: Invalid: Could not open Parquet input "
    "source 'x': Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DeltaError(BACKTRACE), "DeltaError: Json error: Truncated record whilst reading string"),
        (DeltaError(GAP), "DeltaError: Expected contiguous commit files, but found gap: …"),
        (FileNotFoundError(LOST), "FileNotFoundError: /n/shard=7/0.parquet: No such file or directory"),
        (
            ArrowInvalid(STREAM),
            "ArrowInvalid: Invalid: Could not open Parquet input source 'x': Parquet magic bytes not found in footer. "
            "Either the file is corrupted or this is not a parquet file",
        ),
        (
            OSError("Kernel error\n  \x1b[31m->\x1b[0m Generic LocalFileSystem error\n  ↳ Unable to open file /x"),
            "OSError: Unable to open file /x",
        ),
        (OSError("a\n\x1b[31m↳\x1b[0m b"), "OSError: a b"),
        # what only looks like it stays
        (ValueError("expected\n  0: a number\nand got 12"), "ValueError: expected 0: a number and got 12"),
        (ValueError('answered {"Code": {"a": 1}} the { x }'), 'ValueError: answered {"Code": {"a": 1}} the { x }'),
        (ValueError(f"{'x' * 300}{'y' * 300}"), f"ValueError: {'x' * 200} ... {'y' * 300}"),
    ],
)
def test_in_one_line_and_without_what_only_its_authors_can_read(error: Exception, line: str) -> None:
    assert said(error) == line
