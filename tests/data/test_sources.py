"""dtron.data.sources, best_fit_packing and stream: samples are pure functions of their number. The
reference is megatron-core where it is installed."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers

from dtron.data import Documents, Prefetch, get_tokenizer
from dtron.data.best_fit_packing import Fitted, TokenizedDocuments, best_fit, split_into_segments
from dtron.data.indexed import Indexed
from dtron.data.sources import Chunks, Mixed, Packed, Rows
from dtron.data.stream import Stream
from dtron.data.tokenization import encode, end_id
from dtron.runtime.batches import HostBatch, to_host
from dtron.runtime.config import DataConfig, RunConfig
from tests.data.test_indexed import megatron, theirs, write  # noqa: F401  (a fixture)
from tests.helpers.texts import TEXTS, corpus, one_line

COLUMNS = ("tokens", "documents", "positions", "counted")


def same(a: Rows, b: Rows) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and np.array_equal(x, y))
        for x, y in ((getattr(a, name), getattr(b, name)) for name in COLUMNS)
    )


def is_pure(make, start: int, counts: list[int]) -> None:
    """A range of samples is the concatenation of its pieces, in any order of access and for another
    object."""
    whole = make().rows(start, sum(counts))
    assert len(whole.tokens) == sum(counts)
    bounds = np.cumsum([0, *counts])
    source = make()
    for low, high in reversed(list(zip(bounds[:-1], bounds[1:], strict=True))):
        part = source.rows(start + int(low), int(high - low))
        for name in COLUMNS:
            want = getattr(whole, name)
            assert want is None or np.array_equal(getattr(part, name), want[low:high])


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> Indexed:
    documents = [np.random.default_rng(n).integers(1, 99, n * 7 % 23) for n in range(60)]
    return write(tmp_path_factory.mktemp("sources") / "c", documents)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    docs = Documents(str(corpus(folder)), "text", folder, streaming=True)
    return docs, get_tokenizer(None, docs, 400, folder)


def fitted(data: Indexed, learn=None, shuffle=True) -> Fitted:
    return Fitted(TokenizedDocuments(data.tokens, data.starts, data.lengths, learn), 8, 3, shuffle)


KINDS = {
    "chunks": lambda data, _: Chunks(data.tokens, 8, 3, 5, True),
    "packed": lambda data, _: Packed(data, range(2, 50), 8, 3, 30, 99, True),
    "fitted": lambda data, _: fitted(data, np.arange(len(data.tokens)) % 3 > 0),
    "streamed": lambda _, stream: Stream(*stream, 8, True, 4),
    "held": lambda _, stream: Stream(*stream, 8, True, 0, 4),
    "mixed": lambda data, stream: Mixed(
        [
            KINDS["packed"](data, stream),
            KINDS["chunks"](data, stream),
            KINDS["fitted"](data, stream),
        ],
        [0.5, 0.2, 0.3],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@given(start=st.integers(0, 300), counts=st.lists(st.integers(0, 40), min_size=1, max_size=4))
@settings(max_examples=15)
def test_every_source_is_a_pure_function(kind, indexed, stream, start, counts):
    is_pure(lambda: KINDS[kind](indexed, stream), start, counts)


def test_the_property_catches_a_source_with_a_memory(indexed, stream):
    class Forgetful(Packed):
        def rows(self, start: int, count: int) -> Rows:
            self.seen = getattr(self, "seen", 0) + count
            return super().rows(self.seen - count, count)

    with pytest.raises(AssertionError):
        is_pure(lambda: Forgetful(indexed, range(60), 8, 3, 30, 99, True), 5, [3, 4])


def test_sources_have_digests_of_their_own(indexed, stream):
    make = [KINDS[kind](indexed, stream).digest() for kind in KINDS]
    others = [
        Packed(indexed, range(2, 51), 8, 3, 30, 99, True).digest(),
        Packed(indexed, range(2, 50), 9, 3, 30, 99, True).digest(),
        Mixed(
            [KINDS["packed"](indexed, stream), KINDS["chunks"](indexed, stream)], [0.5, 0.5]
        ).digest(),
        Mixed(
            [KINDS["packed"](indexed, stream), KINDS["chunks"](indexed, stream)], [0.4, 0.6]
        ).digest(),
    ]
    assert len({*make, *others}) == len(make) + len(others)
    assert KINDS["mixed"](indexed, stream).digest() == make[-1]


# ---- packed


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=20),
    st.integers(1, 7),
    st.integers(1, 50),
    st.integers(0, 99),
    st.booleans(),
)
@settings(max_examples=40)
def test_rows_are_stretches_of_the_line_of_documents(
    tmp_path_factory, lengths, seq_len, samples, seed, shuffle
):
    if sum(lengths) <= seq_len:
        return
    first = np.cumsum(lengths) - lengths
    documents = [np.arange(a, a + n) for a, n in zip(first, lengths, strict=True)]
    data = write(tmp_path_factory.mktemp("p") / "c", documents)
    source = Packed(data, range(len(data)), seq_len, seed, samples, 999, True, shuffle)
    order = source._made(0)
    line = np.concatenate([documents[d] for d in order.documents])
    begins = np.isin(np.arange(len(line)), order.ends)
    rows = source.rows(0, len(order))
    for row, sample in enumerate(order.shuffle):
        part = slice(int(sample) * seq_len, int(sample) * seq_len + seq_len)
        assert np.array_equal(rows.tokens[row, :-1], line[part])
        assert rows.tokens[row, -1] == line[part.stop]
        inner = begins[part].copy()
        inner[0] = False
        assert np.array_equal(rows.documents[row], np.cumsum(inner))
        places = np.arange(seq_len)
        assert np.array_equal(
            rows.positions[row], places - np.maximum.accumulate(np.where(inner, places, 0))
        )
    if shuffle:  # a longer run goes on in the order of the next seed
        other = Packed(data, range(len(data)), seq_len, seed + 1, samples, 999, True)
        assert same(source.rows(len(order), 3), other.rows(0, 3))


def test_ids_above_the_vocabulary_are_refused_when_read(indexed):
    packed = Packed(indexed, range(60), 8, 0, 10, 50, False)
    one_line(lambda: packed.rows(0, 40), "c.bin", "token id", "0 to 49", "--model.vocab")
    low = fitted(indexed)
    low.vocab = 50
    one_line(lambda: low.rows(0, 40), "token id", "--model.vocab")


def test_samples_and_restarted_positions_are_those_of_gpt_dataset(megatron, tmp_path):  # noqa: F811
    """Equal token for token, over two epochs and a separate last epoch. The index gives the same
    documents as Megatron's end tokens."""
    random = np.random.default_rng(0)
    write(tmp_path / "c", [[*random.integers(1, 5000, n), 0] for n in random.integers(0, 60, 3000)])
    want = theirs(megatron, tmp_path / "c", "95,5", 32, 3100, 11, reset=True)
    data = Indexed(tmp_path / "c")
    source = Packed(data, range(2850), 32, 11, 3100, 5000, True)
    rows = source.rows(0, 3100)
    causal = np.tri(32, dtype=bool)
    for i in range(0, 3100, 3):
        item = want[i]
        assert np.array_equal(item["tokens"], rows.tokens[i, :-1])
        assert np.array_equal(item["labels"], rows.tokens[i, 1:])
        assert np.array_equal(item["position_ids"], rows.positions[i])
        seen = causal & (rows.documents[i][:, None] == rows.documents[i])
        assert np.array_equal(
            ~item["attention_mask"][0].numpy(), seen
        )  # Megatron's mask is true at hidden keys


# ---- fitted


@given(st.lists(st.integers(2, 20), max_size=60))
def test_best_fit_is_the_rule_done_slowly(lengths):
    lengths = np.array(lengths, int)
    bins = best_fit(lengths, 20)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    room = []
    for item in np.argsort(-lengths, kind="stable"):
        fits = [r for r in room if r >= lengths[item]]
        if fits:
            room.remove(min(fits))
            room.append(min(fits) - lengths[item])
        else:
            room.append(20 - lengths[item])
    assert sorted(20 - lengths[items].sum() for items in bins) == sorted(room)


def test_best_fit_wastes_little():
    lengths = np.random.default_rng(0).integers(2, 2048, 20_000)
    assert len(best_fit(lengths, 2049)) * 2049 < lengths.sum() * 1.005


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 12))
def test_every_token_but_a_first_is_a_target_once(lengths, seq_len):
    lengths = np.array(lengths)
    if lengths.max() < 2:
        return
    starts = np.cumsum(lengths) - lengths
    tokens = np.arange(lengths.sum())
    source = Fitted(TokenizedDocuments(tokens, starts, lengths), seq_len, 0)
    _, pieces = split_into_segments(starts, lengths, seq_len)
    assert pieces.min() >= 2 and pieces.max() <= seq_len + 1
    rows = source.rows(0, len(source))
    targets = rows.tokens[:, 1:][rows.counted]
    firsts = {int(s) for s, n in zip(starts, lengths, strict=True) if n}
    assert sorted(targets) == sorted(set(range(len(tokens))) - firsts)
    assert np.array_equal(
        rows.tokens[:, :-1][rows.counted] + 1, targets
    )  # the input of MTP is the next token
    assert rows.valid == len(targets)


def test_documents_in_a_row_are_marked_and_restart(indexed):
    source = fitted(indexed, shuffle=False)
    rows = source.rows(0, len(source))
    for documents, positions in zip(rows.documents, rows.positions, strict=True):
        for document in set(documents):
            places = positions[documents == document]
            assert places.tolist() == list(range(len(places)))
    assert (rows.documents.max(1) > 0).any()


def test_rows_that_only_fill_up_do_not_count(indexed):
    rows = Packed(indexed, range(60), 8, 0, 10, 99, True).rows(0, 3)
    more = rows.filled(4)
    assert more.tokens.shape == (4, 9) and more.valid == rows.valid == 24
    assert more.filled(2) is more and not more.counted[3].any() and more.counted[:3].all()


# ---- streamed


def test_a_stream_is_the_encoded_text_epoch_after_epoch(stream, tmp_path):
    docs, tokenizer = stream
    tokens = encode(TEXTS, tokenizer, tmp_path)
    source = Stream(docs, tokenizer, 16, True)
    rows = source.rows(0, 2 * len(tokens) // 16)
    line = np.concatenate([tokens] * 3)
    want = np.lib.stride_tricks.sliding_window_view(line, 17)[::16][: len(rows.tokens)]
    assert np.array_equal(rows.tokens, want)
    assert rows.documents.max() == (want[:, :-2] == end_id(tokenizer)).sum(1).max()


def test_a_stream_begins_again_near_the_sample_asked_for(stream, monkeypatch):
    docs, tokenizer = stream
    monkeypatch.setattr("dtron.data.stream._MARK", 100)
    source = Stream(docs, tokenizer, 16, False)
    far = source.rows(0, 400).tokens
    assert len(source._known) > 20
    asked = []
    original = source._from
    monkeypatch.setattr(source, "_from", lambda *a: asked.append(a) or original(*a))
    assert np.array_equal(source.rows(333, 5).tokens, far[333:338])
    ((document, place),) = asked
    assert 0 <= 333 * 16 - place <= 200 and document > 0


# ---- read ahead


def test_what_is_read_ahead_comes_in_order_and_errors_where_they_belong():
    def make(n: int) -> int:
        if n == 6:
            raise ValueError("six")
        return n * n

    ahead = Prefetch(make, range(0, 99, 2))
    assert [ahead.next() for _ in range(3)] == [0, 4, 16]
    assert ahead.waited >= 0
    for _ in range(2):
        with pytest.raises(ValueError, match="six"):
            ahead.next()
    short = Prefetch(make, [1, 2])
    assert [short.next(), short.next()] == [1, 4]
    with pytest.raises(StopIteration):
        short.next()


def test_no_more_is_read_ahead_than_asked_for():
    made = []
    room = Prefetch(lambda n: made.append(n) or n, range(100), depth=3)
    for n in range(5):
        assert room.next() == n
        assert len(made) <= n + 4
    room.close()
    room.close()
    thread = room._thread
    thread.join(10)
    assert not thread.is_alive() and len(made) <= 9


# ---- targets in the next document


def of_documents(*documents: list[int], **choices: object) -> HostBatch:
    """The rows of a text of these documents, as training takes them."""
    tokens = np.array([token for document in documents for token in (*document, 0)])
    source = Chunks(tokens, 4, 0, end=0, marks=True, shuffle=False)
    config = RunConfig(mesh="dp=1", data=DataConfig(seq_len=4, document_mask=True, **choices))
    plan = SimpleNamespace(device="cpu")
    return to_host(source.rows(0, len(source)), config, plan)


def test_a_masked_document_does_not_learn_the_beginning_of_the_next():
    """Its last token cannot see which document comes next. The end of a row counts too."""
    batch = of_documents([1, 2], [3], [4, 5, 6, 7, 8])
    tokens, _, _, counted = batch.columns
    assert tokens.tolist() == [[1, 2, 0, 3, 0], [0, 4, 5, 6, 7]]
    assert counted.tolist() == [[True, True, False, True], [False, True, True, True]]
    assert batch.valid == 6


def test_it_learns_the_beginning_of_the_next_if_asked():
    batch = of_documents([1, 2], [3], [4, 5, 6, 7, 8], learn_next_document=True)
    assert batch.columns[3] is None and batch.valid == 8


def test_a_stream_of_text_without_tokens_ends(tmp_path):
    """A tokenizer may drop everything. Then no epoch would ever have a token."""
    (tmp_path / "t.txt").write_text("some words")
    empty = Tokenizer(models.WordLevel({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
    empty.normalizer = normalizers.Replace(Regex(".+"), "")
    stream = Stream(Documents(str(tmp_path / "t.txt"), "text", streaming=True), empty, 8, False)
    one_line(lambda: stream.rows(0, 1), "makes no token", "--data.tokenizer")
