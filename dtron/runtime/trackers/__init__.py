"""Trackers: services and files of others that show a run's metrics."""
