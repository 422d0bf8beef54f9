"""Data preparation: files -> rows -> records -> rendered text -> examples -> batches."""
