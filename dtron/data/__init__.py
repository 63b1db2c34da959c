"""Training samples from text, token files and conversations.

From files to tokens: `formats` and `documents` read text, and `tokenization` encodes it. `chat`
reads conversations, which `chat_template`, `chat_samples` and `chat_encoding` turn into ids.
`special_tokens` finds the token that ends a document. `indexed` reads and writes token files, and
`prepare` makes token files from text.

From tokens to samples: `sources` (in the order of `chunks` or `megatron_order`),
`best_fit_packing`, `stream`, and `mixture` for several sources with weights. `open` opens the data
that the command line names, and `prefetch` reads ahead.

Names are imported on first access, so reading token files needs numpy and nothing else.
"""

from typing import TYPE_CHECKING

from dtron.lazy_names import lazy_names

if TYPE_CHECKING:
    from dtron.data.cache import cache_dir
    from dtron.data.chunks import document_ids, rows
    from dtron.data.documents import Documents
    from dtron.data.indexed import Indexed, Writer
    from dtron.data.open import Data, open_data
    from dtron.data.prefetch import Prefetch
    from dtron.data.sources import Rows, Source
    from dtron.data.special_tokens import end_id
    from dtron.data.tokenization import encode, get_tokenizer

_NAMES = {
    "cache": ["cache_dir"],
    "open": ["Data", "open_data"],
    "indexed": ["Indexed", "Writer"],
    "chunks": ["document_ids", "rows"],
    "prefetch": ["Prefetch"],
    "sources": ["Rows", "Source"],
    "documents": ["Documents"],
    "special_tokens": ["end_id"],
    "tokenization": ["encode", "get_tokenizer"],
}
__all__ = [  # noqa: F822
    "Data",
    "Documents",
    "Indexed",
    "Prefetch",
    "Rows",
    "Source",
    "Writer",
    "cache_dir",
    "document_ids",
    "encode",
    "end_id",
    "get_tokenizer",
    "open_data",
    "rows",
]

__getattr__ = lazy_names(__name__, _NAMES)
