"""The recipe: keys, reading and writing, locating the model, schedule."""
