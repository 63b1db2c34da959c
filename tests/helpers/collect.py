"""Fewer garbage collections: tracing and simulated ranks allocate objects by the million, and a
tenth of their time went into collections that found nothing."""

import gc


def collect_seldom() -> None:
    gc.set_threshold(50_000, 20, 20)
