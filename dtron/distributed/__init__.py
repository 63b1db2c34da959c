"""Collectives, redistribution and what carries the bytes; no layer is known here."""
