"""One recipe fine-tunes a language model on whichever machine runs it, and says whether it got better."""
