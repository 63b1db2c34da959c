"""The mixer of a block: the layer in which a token sees other tokens of its sequence.

All other layers of a block work token by token. Attention is a mixer, and so are convolutions over
the sequence and recurrences. A ``Mixer`` is everything that the rest of dtron must know about one
kind of mixer: its weights, its forward, its decoding cache, its cost, and the models, meshes and
token orders that it supports. A model names the kinds of its blocks by letters (``pattern`` in
model/config.py). No other file asks which kinds a model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.fp8.recipe import Recipe
from dtron.layers.attention_kernels import AttentionPath
from dtron.layers.context_parallel import Method
from dtron.layers.token_order import TokenOrder
from dtron.mesh import Layout
from dtron.tree import Leaf


class TokenData(Protocol):
    """The data of a microbatch's tokens that a mixer may need; see ``Batch`` in model/batch.py."""

    @property
    def positions_T(self) -> Tensor: ...
    @property
    def documents_T(self) -> Tensor | None: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def zigzag(self) -> bool: ...


@dataclass(frozen=True)
class StageInputs:
    """The inputs of ``Mixer.prepare``: one microbatch in one pipeline stage.

    ``x_TD``: the stage's input. Only its dtype and device matter.
    ``batch``: the microbatch.
    ``windows``: the attention windows of the stage's blocks with this mixer, each once.
    ``kernel``, ``cp_method``: the requested attention kernels, and the requested method over cp.
    ``last_B [B@tokens]``: in generation, the index of the last token of each row; -1 if all tokens
        of the row are padding. Later tokens are padding. Generation always gives it (None:
        training)."""

    batch: TokenData
    x_TD: Tensor
    windows: tuple[int | None, ...]
    kernel: AttentionPath = "auto"
    cp_method: Method = "ring"
    last_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MixerInputs:
    """The inputs of a mixer besides weights, activations and layout. A mixer adds its own fields in
    a subclass.

    ``documents_T [T@rows]``: the document of each token, in the row's own order (None: one document
        per seq_len).
    ``eps``: the epsilon of norms.
    ``recipe``: the recipe for FP8 matmuls, or None.
    ``cache``: the decoding cache of this block, see ``Mixer.empty_cache`` (None: no generation).
    ``valid_T [T@tokens_sp]``: whether a token counts in a loss (None: the layer need not return a
        term of the loss, see ``Mixer.loss_name``)."""

    documents_T: Tensor | None = None
    eps: float = 1e-5
    recipe: Recipe | None = None
    cache: Any = None
    valid_T: Tensor | None = None


@dataclass(frozen=True)
class NoWeights:
    """The weights of ``NoMixer``."""

    segment: ClassVar[str] = "none"


@dataclass(frozen=True)
class Mixer(Leaf):
    """One kind of mixer in one model. It has no state.

    ``model``: the model's config.
    ``params``: the class of the weights. Its ``segment`` is their name in paths:
        ``blocks.3.attention.w_q``.

    Sizes and costs of a mesh are per rank. ``tokens`` counts the tokens of all cp and tp ranks
    together, and ``element`` is the number of bytes of one number."""

    model: Any

    params: ClassVar[Any]
    present: ClassVar[bool] = True
    """whether a block has this layer at all; see ``NoMixer``"""
    has_logits: ClassVar[bool] = False
    """whether tokens attend by logits of heads, whose axis is ``heads``"""
    paged: ClassVar[bool] = False
    """whether the decoding cache has pages that the rows share, and no state of constant size for
    each row"""
    chooses: ClassVar[bool] = False
    """whether the layer makes a choice that backward must not make again
    (model/activation_checkpoint.py)"""
    widths: ClassVar[tuple[str, ...]] = ("heads", "kv_heads")
    """the sizes in the model's config that grow with its width (model/widths.py)"""

    @property
    def norm_eps(self) -> float:
        """The epsilon of the norms inside the layer."""
        return self.model.norm_eps

    @property
    def loss_name(self) -> str | None:
        """The name of the layer's own term of the loss in reports; None: the layer has none."""
        return None

    @property
    def score_growth(self) -> float:
        """The factor of attention scores in muP, in addition to the model's."""
        return 1.0

    @property
    def query_weights(self) -> tuple[str, ...]:
        """The last weights and biases that queries pass: a factor of them is one of all scores. An
        export puts ``score_growth`` into them."""
        return ()

    def dims(self) -> dict[str, Any]:
        """Return sizes and flags for the declaration of ``params``, in addition to the model's."""
        return {}

    def apply(self, p: Any, x_TD: Tensor, inputs: Any, layout: Layout) -> Tensor:
        """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement."""
        raise NotImplementedError

    def apply_with_logits(
        self, p: Any, x_TD: Tensor, inputs: Any, layout: Layout
    ) -> tuple[Tensor, ...]:
        """Return the result of ``apply``, and the largest attention logit of each head over this
        microbatch: ``[N@heads]``, where a maximum over tokens is pending (attention_logits.py). For
        a mixer that ``has_logits``."""
        raise NotImplementedError

    def apply_with_loss(
        self, p: Any, x_TD: Tensor, inputs: Any, layout: Layout, logits: bool
    ) -> tuple[Tensor, ...]:
        """Return the result of ``apply``, or with ``logits`` of ``apply_with_logits``, and two sums
        over tokens that are pending: the layer's term of the loss, and for the report ``[2]``, the
        loss without its weight and the number of tokens that count. For a mixer with a
        ``loss_name``; ``inputs.valid_T`` has the tokens that count."""
        raise NotImplementedError

    def logit_factors(self, p: Any, factor_N: Tensor) -> dict[str, Tensor]:
        """Return the factors of weights, by path, that multiply the logits of head n by factor n.
        A factor has the last dims of its weight. For a mixer that ``has_logits``.

        ``p``: the layer's ``WeightSpec`` records."""
        raise NotImplementedError

    def prepare(self, stage: StageInputs, layout: Layout) -> Mapping[int | None, MixerInputs]:
        """Make once the data that the blocks of a stage share. Return the inputs of blocks by their
        window. The caller sets ``eps``, ``recipe`` and ``cache``."""
        inputs = MixerInputs(documents_T=stage.batch.documents_T)
        return dict.fromkeys(stage.windows, inputs)

    def empty_cache(
        self, rows: int, slots: int, layout: Layout, dtype: torch.dtype, device: str
    ) -> Any:
        """Make the decoding cache of one block. ``apply`` updates the cache in place. Training
        draws samples on its own mesh, which may have cp: then each cp rank has whole rows.
        ``dtron.generate`` refuses cp.

        ``rows``: the number of rows over all ranks. For a ``paged`` mixer, the number of pages.
        ``slots``: the largest number of tokens of a row. For a ``paged`` mixer, of a page."""
        raise NotImplementedError

    def orders(self, method: Method) -> tuple[TokenOrder, ...]:
        """Return the token orders over cp that the mixer supports, the best first.

        ``method``: the method of attention over cp."""
        raise NotImplementedError

    def flops(self, seq_len: int, window: int | None) -> float:
        """Return the FLOPs per token, forward and backward, in addition to 6 per weight."""
        return 0.0

    def activation_bytes(self, mesh: MeshShape, tokens: int, element: int) -> int:
        """Return the bytes that the layer keeps for backward, without its input."""
        raise NotImplementedError

    def message_bytes(self, mesh: MeshShape, tokens: int, method: Method, element: int) -> int:
        """Return the peak bytes of messages over cp."""
        return 0

    def check_model(self) -> None:
        """Raise UserError if the model's config does not fit this mixer."""

    def check_mesh(self, mesh: MeshShape, seq_len: int, method: Method) -> None:
        """Raise UserError if the mesh, the sequence length or the attention method does not fit
        this mixer."""

    def check_kernel(self, path: AttentionPath, dtype: torch.dtype, device: str) -> None:
        """Raise UserError if the requested attention kernels do not support this mixer."""


class NoMixer(Mixer):
    """The mixer of a block that is a feed-forward layer alone. It has no weights and no cost, and
    supports every mesh."""

    params: ClassVar[type] = NoWeights
    present: ClassVar[bool] = False
    widths: ClassVar[tuple[str, ...]] = ()

    def empty_cache(
        self, rows: int, slots: int, layout: Layout, dtype: torch.dtype, device: str
    ) -> None:
        return None

    def orders(self, method: Method) -> tuple[TokenOrder, ...]:
        return ("contiguous", "zigzag") if method == "ulysses" else ("zigzag", "contiguous")

    def activation_bytes(self, mesh: MeshShape, tokens: int, element: int) -> int:
        return 0
