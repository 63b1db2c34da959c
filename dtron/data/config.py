"""Config of a run's data: the source of the text, and how it is packed into samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtron.errors import UserError

FIELDS = {"completion": ("prompt", "completion"), "preference": ("prompt", "chosen", "rejected")}
"""The parts of a row, by ``DataConfig.kind``. The prompt of a preference may be missing."""


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
    kind: Literal["documents", "completion", "preference"] = "documents"
    """rows of documents; completion: a prompt and its completion; preference: a chosen and a
    rejected answer, with or without a prompt. Only completions and answers are learned"""
    columns: str = ""
    """fields of rows by their names, as prompt=question,completion=answer"""
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
        if self.kind != "documents" and (self.chat or self.column):
            flag = "--data.chat" if self.chat else f"--data.column {self.column}"
            raise UserError(
                f"{flag} with --data.kind {self.kind}: its rows may be messages already, and "
                f"--data.columns names their fields; leave {flag} out"
            )
        if self.columns and self.kind == "documents":
            raise UserError(
                f"--data.columns {self.columns}: documents have one field; use --data.column, or "
                "--data.kind completion"
            )
        _ = self.fields  # raises UserError for a name that rows do not have
        if self.streaming and self.fitted:
            name = "--data.chat" if self.chat else "--data.packing best-fit"
            name = name if self.kind == "documents" else f"--data.kind {self.kind}"
            raise UserError(
                f"--data.streaming {name}: all lengths must be known first; drop one of the two"
            )

    @property
    def fitted(self) -> bool:
        """Whether whole documents are packed by best fit."""
        return self.chat or self.kind != "documents" or self.packing == "best-fit"

    @property
    def fields(self) -> dict[str, str]:
        """The field or column of each part of a row. Raises UserError for a part that rows of this
        kind do not have."""
        names = {name: name for name in FIELDS.get(self.kind, ())}
        for part in filter(None, (p.strip() for p in self.columns.split(","))):
            name, equals, column = (word.strip() for word in part.partition("="))
            if name not in names or not equals or not column:
                raise UserError(
                    f"--data.columns {part!r}: is no field of --data.kind {self.kind}; write "
                    + ",".join(f"{name}=NAME" for name in names)
                )
            names[name] = column
        return names

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
