"""Collectives, redistribution, and the transports of their bytes. No layer is known here."""
