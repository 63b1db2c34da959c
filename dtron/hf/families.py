"""The model families of Hugging Face: the weights and the config.json of each family.

family.py says what a family is: a record of tables. weight_tables.py has the place of each weight,
config_keys.py the keys of config.json, and config_defaults.py their defaults. A model belongs to a
family if these tables can express all its properties. No property is guessed.

Left out, with what dtron lacks:

- ``gemma4``. In the small models, each block adds embeddings of its own (per-layer embeddings), and
  the last blocks attend to the keys and values of an earlier block, which may be in another
  pipeline stage. In all models, layers without a window have another width of heads, and may have
  another number of key heads, and values that are the keys before their norm and rotation. Values
  have a norm without a weight; the RoPE of these layers is ``proportional``; a block's output has a
  factor. Models with experts have them beside a dense layer, each with norms of its own, and the
  router has a norm, a factor for each channel and one for each expert.
- ``deepseek_v4``. The residual stream is several streams, which each layer mixes
  (hyper-connections, arXiv:2512.24880). dtron's stream is ``[T, embed]`` in the embedding, the
  blocks, the messages of pipelines, the head, multi-token prediction and the estimates, and
  ``block`` adds a layer's output itself: there is no object of a residual policy. Attention is to
  keys that are compressed over several tokens, and its output projection has groups. Some routers
  choose by a hash.
- ``falcon_h1``. A block has attention and Mamba-2 side by side, so its decoding cache has pages and
  states at once. Mamba-2 may lack its norm. Each projection of both, and two of the feed-forward
  layer, has a factor (muP's multipliers).
- ``longrope`` of phi3: its frequencies depend on the length of the batch.
"""

from __future__ import annotations

from dtron.hf.dense_families import DENSE
from dtron.hf.expert_families import EXPERTS
from dtron.hf.family import Family
from dtron.hf.recurrent_families import RECURRENT

FAMILIES: tuple[Family, ...] = (*DENSE, *EXPERTS, *RECURRENT)
