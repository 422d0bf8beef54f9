"""One HTML page of a run, or of runs compared: a single file that asks nobody for anything."""
