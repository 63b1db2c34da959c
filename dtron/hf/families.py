"""The model families of Hugging Face: the weights and the config.json of each family.

family.py says what a family is: a record of tables. weight_tables.py has the place of each weight,
config_keys.py the keys of config.json, and config_defaults.py their defaults. A model belongs to a
family if these tables can express all its properties. No property is guessed.

Left out: ``llama4``. Its router multiplies the input of an expert by the score, not the output; its
attention sees chunks of a row, and its layers without positions scale queries by the position.
"""

from __future__ import annotations

from dtron.hf.dense_families import DENSE
from dtron.hf.expert_families import EXPERTS
from dtron.hf.family import Family

FAMILIES: tuple[Family, ...] = (*DENSE, *EXPERTS)
