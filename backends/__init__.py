"""What differs between machines, and nothing else: one module a framework behind `interface.Session`."""
