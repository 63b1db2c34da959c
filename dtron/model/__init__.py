"""From a batch to a loss: the transformer, its config and its presets."""
