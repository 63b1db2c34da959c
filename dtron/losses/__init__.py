"""The losses that a model can be trained with, chosen by ``--loss.name``: see config.py."""
