"""What a run keeps on the disk: whole files, checkpoints, metrics and the adapter."""
