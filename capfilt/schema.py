"""Column names, Arrow schemas and the closed enums of the curated dataset.

Three Delta tables, each partitioned by ``shard`` (one shard = one input file):

    annotations   one row per INPUT row, without image bytes
    pairs         one row per KEPT image, with its bytes as they came
    quarantine    one row per unusable image, with its bytes up to a cap

``(shard, row)`` is the key everywhere; URLs and keys are not unique on the web.
"""

from __future__ import annotations

from enum import StrEnum

import pyarrow as pa


class Status(StrEnum):
    """What became of an input row. Every row has exactly one."""

    KEPT = "kept"
    DROPPED = "dropped"
    ERROR = "error"


class Source(StrEnum):
    """Where a text came from."""

    WEB = "web"
    SYNTHETIC = "synthetic"


class Reason(StrEnum):
    """Why a row was dropped or is an error, or why a text was not kept. Closed: consumers may rely on it."""

    # rows: dropped
    NO_IMAGE = "no_image"  # the row came without an image (a failed download, say)
    NO_TEXT = "no_text"  # nothing to judge: no web text, and the captioners wrote nothing
    NO_MATCH = "no_match"  # texts were judged, none was kept
    WITHDRAWN = "withdrawn"  # on a list of what owners withdrew; nothing that the row held is kept
    # rows: dropped, and texts of theirs that match; `duplicate_of` names the row that stays
    DUPLICATE = "duplicate"  # the same bytes as an image that is kept
    NEAR_DUPLICATE = "near_duplicate"  # to the eye the same as an image that is kept
    SAME_URL = "same_url"  # enough rows of this URL are kept
    KEPT_OUT_DOMAIN = "kept_out_domain"  # its URL is under one of keep_out.domains; and its texts that match
    KEPT_OUT_IMAGE = "kept_out_image"  # keep_out.classifier says so; and its texts that match
    # rows: errors
    EMPTY_IMAGE = "empty_image"  # zero bytes
    NOT_AN_IMAGE = "not_an_image"  # HTML, SVG, text, an unknown or unsupported format
    TRUNCATED_IMAGE = "truncated_image"  # the data end before the picture does
    CORRUPT_IMAGE = "corrupt_image"  # the header promises what the data do not hold
    TOO_MANY_PIXELS = "too_many_pixels"  # the header claims more than images.max_pixels, or decoding it is a bomb
    TOO_MANY_BYTES = "too_many_bytes"  # the encoded image is larger than images.max_bytes
    MODEL_ERROR = "model_error"  # a captioner or filter raised on this row alone
    WORKER_DIED = "worker_died"  # the row killed its worker, twice, alone
    UNREADABLE_ROW = "unreadable_row"  # the input file's pages holding this row cannot be read
    # texts
    BELOW_THRESHOLD = "below_threshold"  # the ITM head says unmatched: the filters' mean, or half of their votes
    KEPT_OUT_WORD = "kept_out_word"  # it has one of keep_out.words; and a row of which no other text is there to judge
    EMPTY_TEXT = "empty_text"  # null, or nothing is left after clean-up
    DUPLICATE_TEXT = "duplicate_text"  # the same, after clean-up, as a text of this image judged before it
    NOT_BEST = "not_best"  # above the threshold, but another synthetic text scored higher; under `keep: best`
    NOT_SCORED = "not_scored"  # the row is an error or has no image


ERRORS = frozenset(
    {
        *(Reason.EMPTY_IMAGE, Reason.NOT_AN_IMAGE, Reason.TRUNCATED_IMAGE, Reason.CORRUPT_IMAGE),
        *(Reason.TOO_MANY_PIXELS, Reason.TOO_MANY_BYTES, Reason.MODEL_ERROR, Reason.WORKER_DIED),
        Reason.UNREADABLE_ROW,
    }
)
"""Of rows that could not be judged; all others are of what was."""

COPIES = (Reason.DUPLICATE, Reason.NEAR_DUPLICATE, Reason.SAME_URL)
"""Of rows whose texts match, and that would be kept if another were not."""

ANNOTATIONS = "annotations"
PAIRS = "pairs"
QUARANTINE = "quarantine"

SHARD = "shard"
"""The partition column: in the Delta log and the directory names, not in the files."""

SCORE_STRUCT = pa.struct(
    [
        pa.field("filter", pa.string()),  # name of the model card
        pa.field("itm", pa.float32()),  # P(match) in [0, 1]; of a `clip` or `siglip` card in the card's unit
        pa.field("itc", pa.float32()),  # cosine similarity in [-1, 1], null where the card wants none
    ]
)

TEXT_STRUCT = pa.struct(
    [
        pa.field("source", pa.string()),  # Source: "web" or "synthetic"
        pa.field("captioner", pa.string()),  # name of the model card, null for web
        pa.field("candidate", pa.int32()),  # 0 for web; 0..k-1 for each captioner
        pa.field("text", pa.string()),  # as it came; clean-up is applied for scoring only
        pa.field("itm", pa.float32()),  # mean of the filters', null where not scored
        pa.field("itc", pa.float32()),  # mean of those of the filters that give one, null where none does
        pa.field("scores", pa.list_(SCORE_STRUCT)),  # of each filter, in the spec's order; empty where not scored
        pa.field("kept", pa.bool_()),  # whether it is among the pair's captions
        pa.field("reason", pa.string()),  # Reason, null where kept
    ]
)

ROW_STRUCT = pa.struct(
    [
        pa.field("shard", pa.string()),  # that row's
        pa.field("row", pa.int64()),  # that row's
    ]
)

CAPTION_STRUCT = pa.struct(
    [
        pa.field("text", pa.string()),  # as in the annotations, as are the others
        pa.field("source", pa.string()),  # Source: "web" or "synthetic"
        pa.field("captioner", pa.string()),  # name of the model card, null for web
        pa.field("itm", pa.float32()),  # mean of the filters'
    ]
)

_IDENTITY = [
    pa.field("row", pa.int64()),  # position in the input file, from 0
    pa.field("key", pa.string()),  # as the input has it; not unique
    pa.field("url", pa.string()),  # as the input has it; not unique
]

_PICTURE = [
    pa.field("format", pa.string()),  # "JPEG", "PNG", ... as the bytes say, not the file name
    pa.field("width", pa.int32()),  # pixels, EXIF orientation applied
    pa.field("height", pa.int32()),  # likewise
    pa.field("image_sha256", pa.string()),  # hex, of the bytes as they came
]

ANNOTATION_FILE_SCHEMA = pa.schema(
    [
        *_IDENTITY,
        *_PICTURE,
        pa.field("image_bytes", pa.int64()),  # encoded size, null without an image
        pa.field("source_sha256", pa.string()),  # what the input says (img2dataset: of the download)
        pa.field("status", pa.string()),  # Status: "kept", "dropped" or "error"
        pa.field("reason", pa.string()),  # Reason, null where kept
        pa.field("detail", pa.string()),  # of an error, one line for a person; null unless an error
        pa.field("note", pa.string()),  # what the input says of a missing image; of a withdrawn row, its digests
        pa.field("texts", pa.list_(TEXT_STRUCT)),  # every text: web first, then each captioner's candidates, in order
        pa.field("seed", pa.int64()),  # of the captions
        pa.field("caption_fingerprint", pa.string()),  # what the captions depend on besides the image
        pa.field("score_fingerprint", pa.string()),  # and the scores
        pa.field("decide_fingerprint", pa.string()),  # and the decisions
        pa.field("input_id", pa.string()),  # content identity of the input file
        pa.field("run", pa.string()),  # id of the run that wrote the row; see _runs/
        # New columns come after PROVENANCE: a Delta log has statistics of a table's first 32 leaf columns only.
        pa.field("perceptual_hash", pa.binary()),  # see capfilt.perceptual; null where no near copies are wanted
        pa.field("unsafe", pa.float32()),  # P(one of keep_out.classifier's labels) in [0, 1]; null without one
        pa.field("duplicate_of", ROW_STRUCT),  # the row that is kept in place of this one; null where no copy
        pa.field("generation", pa.int64()),  # when its texts were scored; of copies the earliest stays
    ]
)

PAIR_FILE_SCHEMA = pa.schema(
    [
        *_IDENTITY,
        *_PICTURE,
        pa.field("image", pa.binary()),  # as it came, never re-encoded
        pa.field("text", pa.string()),  # the kept text with the highest ITM score
        pa.field("captions", pa.list_(CAPTION_STRUCT)),  # every kept text
        pa.field("run", pa.string()),  # id of the run that wrote the row
    ]
)

QUARANTINE_FILE_SCHEMA = pa.schema(
    [
        *_IDENTITY,
        pa.field("reason", pa.string()),  # Reason, of a row in error
        pa.field("detail", pa.string()),  # what was wrong, one line for a person
        pa.field("image_bytes", pa.int64()),  # size before the cap
        pa.field("image", pa.binary()),  # at most images.quarantine_bytes of it
        pa.field("run", pa.string()),  # id of the run that wrote the row
    ]
)

FILE_SCHEMAS = {
    ANNOTATIONS: ANNOTATION_FILE_SCHEMA,
    PAIRS: PAIR_FILE_SCHEMA,
    QUARANTINE: QUARANTINE_FILE_SCHEMA,
}

PROVENANCE = ("input_id", "caption_fingerprint", "score_fingerprint", "decide_fingerprint", "run")
"""Columns constant within a shard: their min and max in the Delta log tell the shard's state without a read."""


def table_schema(table: str) -> pa.Schema:
    """Schema of a whole Delta table: its files' columns and the partition column."""
    return pa.schema([pa.field(SHARD, pa.string()), *FILE_SCHEMAS[table]])
