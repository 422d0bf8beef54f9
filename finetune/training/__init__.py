"""Training: a recipe made ready, how much fits in memory, and the loop of optimiser steps."""
