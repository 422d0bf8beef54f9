"""What a person should know of their data before a model is loaded: one module a question, and one that shows it."""
