"""The names of a block's outputs beside its activations."""

from __future__ import annotations

LARGEST_LOGITS = "largest_logits"
MIXER_LOSS = ("mixer_aux", "mixer_loss")  # see ``Mixer.apply_with_loss``
LAYER_STATS = ("load", "router", "dropped")  # the fields of ``LayerStats``


def output_names(logits: bool, learns: bool, sparse: bool) -> tuple[str, ...]:
    """Return the names of a block's outputs after x_TD: its largest attention logits, the term of
    the loss of a mixer that ``learns`` by a loss of its own and its sums, and with experts their
    term of the loss and the fields of ``LayerStats``."""
    return (LARGEST_LOGITS,) * logits + MIXER_LOSS * learns + ("aux", *LAYER_STATS) * sparse
