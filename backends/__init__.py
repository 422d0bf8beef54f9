"""The machine-dependent half: one folder per framework. `README.md` says how to write a backend."""

import os

# Threads that wait should soon sleep. By default they spin for milliseconds, and beside another program torch's steps
# on a CPU then take up to thirty times as long. Where they never spin, each product on an idle virtual machine waits
# for a core to wake up, and a small step takes twice as long. GNU's OpenMP, which is torch's on Linux, reads the count.
# OpenMP reads both when it is loaded, so they must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
