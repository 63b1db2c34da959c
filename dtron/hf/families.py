"""The model families of Hugging Face: the weights and the config.json of each family.

family.py says what a family is: a record of tables. weight_tables.py has the place of each weight,
config_keys.py the keys of config.json, and config_defaults.py their defaults. A model belongs to a
family if these tables can express all its properties. No property is guessed.

Left out: ``llama4``. Five of its properties have no field in dtron: scores multiply the inputs of
experts, not their outputs; attention is within chunks of a row; experts are in every nth layer;
queries and keys are normalised after their rotation, without weights; and in layers without
positions, queries are scaled by the position. And ``longrope`` of phi3: its frequencies depend on
the length of the batch.
"""

from __future__ import annotations

from dtron.hf.dense_families import DENSE
from dtron.hf.expert_families import EXPERTS
from dtron.hf.family import Family
from dtron.hf.recurrent_families import RECURRENT

FAMILIES: tuple[Family, ...] = (*DENSE, *EXPERTS, *RECURRENT)
