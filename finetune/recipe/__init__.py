"""The recipe: its keys, how it is read and written, where its model is, and the steps that follow from it."""
