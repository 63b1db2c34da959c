"""Text, tokens and conversations to training samples.

Documents: `formats` and `text` read them, `chat` reads conversations, `tokens` encodes, `indexed` reads and
writes token files, `prepare` makes those from text. Samples: `sources` (from `loader`'s chunks or `order`),
`fit`, `stream`, several by weight with `mixture`. `corpus` puts together what the command line names, and
`prefetch` reads ahead.
"""

from dtron.data.cache import cache_dir
from dtron.data.corpus import Data, open_data
from dtron.data.indexed import Indexed, Writer
from dtron.data.loader import Corpus, document_ids, load_corpus, rows
from dtron.data.prefetch import Prefetch
from dtron.data.sources import Rows, Source
from dtron.data.text import Documents, documents
from dtron.data.tokens import encode, end_id, get_tokenizer

__all__ = [
    "Corpus",
    "Data",
    "Documents",
    "Indexed",
    "Prefetch",
    "Rows",
    "Source",
    "Writer",
    "cache_dir",
    "document_ids",
    "documents",
    "encode",
    "end_id",
    "get_tokenizer",
    "load_corpus",
    "open_data",
    "rows",
]
