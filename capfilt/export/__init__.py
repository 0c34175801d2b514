"""Export: one version of a curated dataset, written as a trainer reads it.

driver.py     the whole of it: what is left to write, writers, what is on record at the end
shards.py     the rows of a version, cut into files; reading them
choice.py     which of an image's texts
folder.py     files of an export that is not complete yet, and how it becomes complete
card.py       README.md
webdataset.py parquet.py authors.py mds.py litdata.py     the formats
"""
