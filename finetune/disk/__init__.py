"""Files of a run: atomic writes, checkpoints, metrics, adapter."""
