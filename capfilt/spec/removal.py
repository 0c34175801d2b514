"""What a curated dataset no longer holds: rows that their owners withdrew, versions that are old."""

from __future__ import annotations

from pydantic import Field, model_validator

from capfilt.spec.fields import Location, Model, StorageOptions


class Withdrawn(Model):
    """Rows that their owners withdrew: no run curates them, and the next version holds nothing of what they held.

    Lists are Parquet (.parquet), CSV with a header (.csv) or text (.txt: an entry a line), the latter two also
    compressed (.gz). An entry matches where it is equal to the row's URL or key, character by character.
    """

    urls: tuple[Location, ...] = Field(default=(), description="Lists of URLs: files or globs, local or fsspec URLs.")
    keys: tuple[Location, ...] = Field(default=(), description="Lists of keys, likewise; of each key all rows go.")
    url_column: str = Field(default="url", min_length=1, description="Of the URLs' lists, where they are no text.")
    key_column: str = Field(default="key", min_length=1, description="Of the keys' lists, where they are no text.")
    storage_options: StorageOptions = Field(
        default={}, description="For fsspec: endpoint, profile, region, ... never a secret."
    )


class Retention(Model):
    """Which old versions a run leaves readable when it ends; without it, all. A version that either field names stays.

    A version here is what a run left behind that committed something; those that it made on its way to there go.
    """

    versions: int | None = Field(default=None, ge=1, description="The newest so many, the run's own included.")
    days: float | None = Field(default=None, ge=0, le=36_500, description="Those that were the newest since then.")

    @model_validator(mode="after")
    def _says_something(self) -> Retention:
        if self.versions is None and self.days is None:
            raise ValueError("give versions, days or both; without `retention` every version stays")
        return self
