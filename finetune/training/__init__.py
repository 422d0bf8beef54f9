"""Training: preparing a job, fitting it into memory, and the loop of optimiser steps."""
