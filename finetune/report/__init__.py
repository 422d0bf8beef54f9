"""What a person sees of a run: the screen while it goes on, and the report, tables and pictures after it."""
