"""The factors of muP in an export. Hugging Face's models have no factor of logits and none of
attention scores, so an export multiplies weights by them.

Logits are linear in the norm before the head, also where the head is the embedding. Attention
scores are linear in the queries. The modules of multi-token prediction normalise what they get, so
their result is the same up to the epsilon of their norms.
"""

from __future__ import annotations

import re

from dtron.model.config import ModelConfig


def mup_factor(m: ModelConfig, path: str) -> float:
    """Return the factor of a weight. It is 1 in the standard parametrization."""
    if re.fullmatch(r"(mtp\.\d+\.)?norm\.(scale|bias)", path):
        return 1 / m.width
    block = re.match(r"(blocks|mtp)\.(\d+)\.(?:block\.)?", path)
    if block is None:
        return 1.0
    mixer = m.mixer(m.letter(int(block[2]) + (m.layers if block[1] == "mtp" else 0)))
    of_queries = {f"{mixer.params.segment}.{name}" for name in mixer.query_weights}
    return mixer.score_growth if path[block.end() :] in of_queries else 1.0
