"""Config of a run's data: the source of the text, and how it is packed into samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtron.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Source of the text."""

    path: str | None = None
    """a .txt, .jsonl, .parquet or .arrow file, a folder of them, or the name of a .bin/.idx pair;
    several with weights as '0.7 web.jsonl, 0.3 code'; None: the source code of Python's
    standard library"""
    tokenizer: str | None = None
    """a tokenizer.json, or a folder with one; None: the tokenizer beside a .bin/.idx pair, or else
    a byte-level BPE of model.vocab words, trained on the text and cached"""
    end_token: str | None = None
    """the token that ends a document; None: the tokenizer's eos_token, from the files beside it"""
    column: str | None = None
    """field or column with the text; None: text, or messages with chat"""
    seq_len: int = 256
    """tokens per sample"""
    packing: Literal["concatenate", "best-fit"] = "concatenate"
    """concatenate: split the concatenated documents into rows; best-fit: pack whole documents into
    rows, masked from each other"""
    chat: bool = False
    """rows are conversations, packed by best fit; only the assistant's messages are learned"""
    streaming: bool = False
    """tokenise text during training, in the order of the files, instead of before training"""
    document_mask: bool = False
    """tokens attend within their document only"""
    learn_next_document: bool = False
    """with document_mask: the last token of a document learns the first token of the next document,
    which it cannot see"""
    document_positions: bool | None = None
    """positions restart in each document; None: if tokens attend within their document only"""
    validation_ratio: float = 0.02
    """share of the text that is held out for validation"""
    split: str | None = None
    """shares of a .bin/.idx pair's documents for training, validation and test, as 969,30,1; None:
    by validation_ratio"""
    samples: int | None = None
    """number of samples that the order of a .bin/.idx pair is made for; None: the samples of
    all steps"""

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UserError(f"data.seq_len={self.seq_len}: a sample has at least 1 token; raise it")
        if not 0 < self.validation_ratio < 1:
            raise UserError(
                f"data.validation_ratio={self.validation_ratio}: a share between 0 and 1; change it"
            )
        if self.samples is not None and self.samples < 1:
            raise UserError(
                f"data.samples={self.samples}: must be at least 1; raise it, or leave it out"
            )
        if self.streaming and self.fitted:
            name = "--data.chat" if self.chat else "--data.packing best-fit"
            raise UserError(
                f"--data.streaming {name}: all lengths must be known first; drop one of the two"
            )

    @property
    def fitted(self) -> bool:
        """Whether whole documents are packed by best fit."""
        return self.chat or self.packing == "best-fit"

    @property
    def masked(self) -> bool:
        """Whether tokens attend within their document only."""
        return self.document_mask or self.fitted

    @property
    def restarts(self) -> bool:
        """Whether positions restart in each document."""
        return self.masked if self.document_positions is None else self.document_positions

    @property
    def marked(self) -> bool:
        """Whether samples need the place of their documents."""
        return self.masked or self.restarts
