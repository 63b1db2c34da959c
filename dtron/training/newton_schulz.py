"""Newton-Schulz iterations: the nearest semi-orthogonal matrix, by matmuls alone.

If G = U S V^T is the singular value decomposition of a matrix, U V^T is the semi-orthogonal matrix
nearest to G. Muon's update of a weight is U V^T of its momentum. An odd polynomial of a matrix acts
on its singular values alone:

    p(X) = a X + b (X X^T) X + c (X X^T)^2 X      has the singular values  a s + b s^3 + c s^5

The coefficients of Jordan (2024, https://kellerjordan.github.io/posts/muon) bring singular values
from (0, 1] to about 1, between 0.7 and 1.2, in five iterations, also small ones. For Muon that is
near enough. Matmuls in bfloat16 are near enough too.

Left out: coefficients for each iteration (Polar Express, arXiv:2505.16932), and kernels that
compute only half of the symmetric product.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(x: Tensor, iterations: int = 5) -> Tensor:
    """Return about U V^T of each matrix.

    ``x``: ``[n, rows, columns]``. A matrix of zeros stays zero."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT  # the smaller of the two products
    norm = wide.norm(dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    # No singular value is larger than the Frobenius norm.
    wide = (wide / norm.clamp(min=1e-7)).to(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        # Each sum is rounded once, after the matmul.
        product = wide @ wide.mT
        factor = torch.baddbmm(product, product, product, beta=b, alpha=c)
        wide = torch.baddbmm(wide, factor, wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.mT
