"""Run the garbage collector seldom.

Tracing and simulated ranks allocate millions of objects. Collections that found nothing took a
tenth of their time."""

import gc


def collect_seldom() -> None:
    gc.set_threshold(50_000, 20, 20)
