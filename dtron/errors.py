"""The three errors that dtron raises on purpose, told apart by type.

``UserError`` is for whoever runs a program: a command line prints it as one line, without a
traceback, and exits with 2. ``PlacementError`` is for whoever edits a layer, and keeps its
traceback, which names the line. Any other exception is a fault of dtron or of a library, and keeps
its traceback too.
"""


class UserError(ValueError):
    """An input that cannot be used. The message has the value, the rule and the remedy."""


class LostRank(UserError):
    """Another rank has died. Each rank that notices says so at once: it may be the only one
    left."""


class PlacementError(ValueError):
    """A tensor that is not sharded as the operation needs it. The message names both placements."""
