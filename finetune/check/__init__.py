"""Checks of the data before a model is loaded: one module per question, and one that shows the findings."""
