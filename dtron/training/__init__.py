"""One step of training: gradients, optimizer, compiled stages, a recorded step."""
