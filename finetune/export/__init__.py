"""Models for other programs, and the proof that they do what the adapter does."""
