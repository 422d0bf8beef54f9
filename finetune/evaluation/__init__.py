"""Evaluation: the same measurement for every model, with its intervals and the verdicts drawn from it."""
