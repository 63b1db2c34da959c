"""dtron: transformer training on any device mesh; one declaration per weight, the same result on
every mesh."""

__version__ = "0.1.0"
