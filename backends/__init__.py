"""What differs between machines, and nothing else: one module a framework behind `interface.Session`."""

import os

# Threads that wait should sleep. By default they spin, and beside any other program torch's steps on a CPU then
# take up to thirty times as long. OpenMP reads this when it is loaded, so it has to be said before torch is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
