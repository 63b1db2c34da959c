"""Flags, processes, signals and logs of a run."""
