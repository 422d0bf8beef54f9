"""The HTML report of one run or of several compared: a single file without network access."""
