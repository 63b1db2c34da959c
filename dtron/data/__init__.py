"""Text to training samples: `text` reads documents, `tokens` encodes them, `loader` cuts them into rows."""

from dtron.data.cache import cache_dir
from dtron.data.loader import Corpus, document_ids, load_corpus, rows
from dtron.data.text import Documents, documents
from dtron.data.tokens import encode, end_id, get_tokenizer

__all__ = [
    "Corpus",
    "Documents",
    "cache_dir",
    "document_ids",
    "documents",
    "encode",
    "end_id",
    "get_tokenizer",
    "load_corpus",
    "rows",
]
