"""The machine-dependent half: one folder per framework. `README.md` says how to write a backend."""

import os

# Threads that wait should sleep. By default they spin, and beside another program torch's steps on a CPU then take
# up to thirty times as long. OpenMP reads this when it is loaded, so it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
