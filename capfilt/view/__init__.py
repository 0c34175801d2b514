"""`capfilt view`: look through a curated dataset of any size, compare two versions, and mark texts right or wrong."""
