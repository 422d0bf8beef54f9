"""A run's model in the forms that other programs load, each verified against the run before it is handed out."""
