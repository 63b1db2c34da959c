"""The three errors that dtron raises on purpose.

``UserError`` is for the user of a program: a command line prints it as one line, without a
traceback, and exits with 2. ``PlacementError`` is for the author of a layer, and keeps its
traceback, which names the line. Any other exception is a fault of dtron or of a library, and keeps
its traceback too.
"""


class UserError(ValueError):
    """An input that cannot be used. The message has the value, the rule and the remedy."""


class LostRank(UserError):
    """Another rank has died. Each rank that notices reports the loss at once: it may be the last
    rank that still runs."""


class PlacementError(ValueError):
    """A tensor with other placements than the operation needs. The message names both."""
