"""dtron.data.indexed and dtron.data.megatron_order: the files byte for byte, and the order of
samples, against megatron-core's own where it is installed."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtron.data import megatron_order
from dtron.data.indexed import DTYPES, HEADER, Indexed, Writer, prefix_of, token_dtype
from dtron.data.megatron_order import (
    in_order,
    make_order,
    most_samples,
    plan_epochs,
    split_documents,
)
from tests.helpers.texts import one_line

DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=12)


def write(prefix: Path, documents, dtype="<u2", **options) -> Indexed:
    with Writer(prefix, dtype, **options) as out:
        for document in documents:
            out.document(np.array(document, np.int64))
    return Indexed(prefix)


def synthetic(prefix: Path, seed: int, documents: int, longest: int) -> Indexed:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest, documents)
    return write(prefix, [random.integers(0, 5000, n) for n in lengths])


@pytest.mark.parametrize("code", DTYPES)
def test_the_layout_written_out(code, tmp_path):
    dtype = np.dtype(DTYPES[code])
    with Writer(tmp_path / "c", dtype) as out:
        out.document(np.array([5, 6, 7]), [1, 2])
        out.document(np.array([], dtype))
        out.document(np.array([8]))
    step = dtype.itemsize
    want = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 4, 4)
    want += struct.pack("<4i", 1, 2, 0, 1) + struct.pack("<4q", 0, step, 3 * step, 3 * step)
    want += struct.pack("<4q", 0, 2, 3, 4)
    assert (tmp_path / "c.idx").read_bytes() == want
    assert (tmp_path / "c.bin").read_bytes() == np.array([5, 6, 7, 8], dtype).tobytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.bin", "c.idx"]
    read = Indexed(tmp_path / "c")
    assert [read.sequence(i).tolist() for i in range(4)] == [[5], [6, 7], [], [8]]
    assert read.documents.tolist() == [0, 2, 3, 4] and read.dtype == dtype


def test_the_type_of_a_vocabulary():
    assert [token_dtype(n) for n in (256, 65499, 65500, 128256)] == ["<u2", "<u2", "<i4", "<i4"]


def test_a_pair_is_found_by_any_of_its_names(tmp_path):
    write(tmp_path / "a.b", [[1]])
    assert {prefix_of(tmp_path / name) for name in ("a.b", "a.b.bin", "a.b.idx")} == {
        tmp_path / "a.b"
    }
    assert prefix_of(tmp_path / "a") is None


def test_damage_is_one_line(tmp_path):
    write(tmp_path / "c", [[1, 2, 3], [4]])
    idx, tokens = (tmp_path / "c.idx").read_bytes(), (tmp_path / "c.bin").read_bytes()

    def refused(*parts: str, index: bytes = idx, data: bytes = tokens) -> None:
        (tmp_path / "d.idx").write_bytes(index)
        (tmp_path / "d.bin").write_bytes(data)
        one_line(lambda: Indexed(tmp_path / "d"), *parts, "dtron.data prepare")

    for n in range(1, len(idx)):
        refused("d.idx", "cut short", str(n), index=idx[:n])
    for n in range(len(tokens)):
        refused("d.bin", "cut short", f"{n} bytes", "says 8", data=tokens[:n])
    refused("d.idx", "no index of tokens", "b''", index=b"")
    refused("no index of tokens", "MMIDIDX", index=b"PK" + idx[2:])
    refused("version 2", index=idx[:9] + b"\2" + idx[10:])
    refused("type 9", "1 to 8", index=idx[:17] + b"\x09" + idx[18:])
    refused("too long", index=idx + b"?")
    refused("sequences, which cannot be", index=idx[:18] + b"\xff" * 8 + idx[26:])

    def put(at, value, kind):
        return idx[:at] + struct.pack(kind, value) + idx[at + struct.calcsize(kind) :]

    refused("negative", index=put(HEADER.size, -1, "<i"))
    refused("no documents", index=idx[:26] + bytes(8) + idx[34:-24])
    refused("documents that do not end with its 2 sequences", index=put(len(idx) - 8, 1, "<q"))
    refused("begins before the one ahead", index=put(len(idx) - 16, 7, "<q"))
    for place in (0, 1, 4, 8, -2, 1002, 2**61, 2**62, 2**63 - 2, -(2**63)):
        refused("does not begin where", index=put(HEADER.size + 16, place, "<q"))
    for more in (b"?", b"??", tokens):
        refused("d.bin", "too long", f"{8 + len(more)} bytes", "says 8", data=tokens + more)
    (tmp_path / "d.bin").unlink()
    one_line(lambda: Indexed(tmp_path / "d"), "d.bin", "does not exist", "d.idx")
    one_line(lambda: write(tmp_path / "e", [[]]), "e.idx", "no token at all")


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_what_is_no_file_is_one_line(tmp_path, suffix):
    write(tmp_path / "c", [[1, 2, 3], [4]])
    file = (tmp_path / "c").with_suffix(suffix)

    def refused(reason: str) -> None:
        one_line(lambda: Indexed(tmp_path / "c"), repr(str(file)), reason)
        file.rmdir() if file.is_dir() else file.unlink()

    file.unlink()
    file.mkdir()
    refused("Is a directory")
    os.mkfifo(file)
    refused("no regular file")
    file.symlink_to("/dev/zero")
    refused("no regular file")
    file.symlink_to(file.name)
    refused("symbolic links")
    file.symlink_to("gone")
    refused("does not exist")


def test_nothing_is_written_over_and_nothing_half_written_stays(tmp_path):
    write(tmp_path / "c", [[1]])
    one_line(lambda: write(tmp_path / "c", [[2]]), "c.bin", "exists", "--overwrite")
    with pytest.raises(KeyError), Writer(tmp_path / "c", "<u2", overwrite=True) as out:
        out.document(np.array([3, 4]))
        raise KeyError
    assert Indexed(tmp_path / "c").tokens.tolist() == [1] and len(list(tmp_path.iterdir())) == 2
    assert write(tmp_path / "c", [[2, 5]], overwrite=True).tokens.tolist() == [2, 5]
    one_line(lambda: write(tmp_path / "f", [[70000]]), "70000", "uint16")
    (tmp_path / "file").touch()
    one_line(lambda: write(tmp_path / "file" / "c", [[1]]), "--out", "cannot be written")
    assert len(list(tmp_path.iterdir())) == 3


# ---- the order


@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 80))
def test_epochs_are_the_smallest_and_the_same_order_is_known_as_such(tokens, seq_len, samples):
    tokens = max(tokens, seq_len + 1)
    epochs, apart = plan_epochs(tokens, seq_len, samples)
    assert epochs * tokens >= samples * seq_len + 1
    assert epochs == 1 or (epochs - 1) * tokens < samples * seq_len + 1
    most = most_samples(tokens, seq_len, samples)
    assert most >= samples and plan_epochs(tokens, seq_len, most) == (epochs, apart)
    assert plan_epochs(tokens, seq_len, most + 1) != (epochs, apart)


@given(DOCUMENTS, st.integers(1, 8), st.integers(1, 60), st.integers(0, 99))
def test_an_order_draws_every_sample_of_the_line_once(documents, seq_len, samples, seed):
    lengths = np.array([len(d) for d in documents])
    if lengths.sum() <= seq_len:
        return
    order = make_order(lengths, np.arange(len(lengths)), seq_len, samples, seed)
    epochs, apart = plan_epochs(int(lengths.sum()), seq_len, samples)
    assert sorted(order.shuffle) == list(range(len(order))) and len(order) >= samples
    assert np.bincount(order.documents, minlength=len(lengths)).tolist() == [epochs] * len(lengths)
    if apart:
        assert sorted(order.documents[-len(lengths) :]) == list(range(len(lengths)))
    line = np.concatenate([np.arange(lengths[d]) for d in order.documents])
    at, inside = order.place(np.arange(len(line)))
    assert np.array_equal(inside, line) and lengths[order.documents[at]].min() > 0
    flat = in_order(lengths, np.arange(len(lengths)), seq_len)
    assert flat.shuffle.tolist() == list(range((int(lengths.sum()) - 1) // seq_len))


def test_the_split_of_documents():
    assert split_documents("969,30,1", 1000) == [(0, 969), (969, 999), (999, 1000)]
    assert split_documents("1", 7) == [(0, 7), (7, 7), (7, 7)]
    assert split_documents("98,2", 10) == [(0, 10), (10, 10), (10, 10)]
    for bad in ("", "a,b", "-1,2", "0,0", "1,1,1,1", "nan", "inf,1"):
        one_line(lambda bad=bad: split_documents(bad, 5), f"--data.split {bad!r}", "969,30,1")


# ---- against megatron-core


@pytest.fixture(scope="module")
def megatron():
    pytest.importorskip("megatron.core.datasets.helpers_cpp", exc_type=ImportError)
    from megatron.core.datasets import gpt_dataset, indexed_dataset, utils

    return gpt_dataset, indexed_dataset, utils


class Words:
    """The part of a tokenizer that GPTDataset uses."""

    vocab_size, eod, pad = 5000, 0, -1
    unique_identifiers = {"class": "Words"}


def theirs(
    megatron, prefix: Path, split: str, seq_len: int, samples: int, seed: int, reset: bool = False
):
    """Training samples of GPTDataset, built by its builder."""
    gpt, indexed, utils = megatron
    config = gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        blend=([str(prefix)], None),
        split=split,
        tokenizer=Words(),
        reset_position_ids=reset,
        reset_attention_mask=reset,
        eod_mask_loss=False,
        create_attention_mask=reset,
        path_to_cache=str(prefix.parent / "cache"),
    )
    data = indexed.IndexedDataset(str(prefix))
    low, high = (int(round(bound * float(len(data)))) for bound in config.split_matrix[0])
    return gpt.GPTDataset(
        data, str(prefix), np.arange(low, high, dtype=np.int32), samples, utils.Split.train, config
    )


def agree(
    megatron, prefix: Path, split: str, seq_len: int, samples: int, seed: int
) -> tuple[int, bool]:
    want = theirs(megatron, prefix, split, seq_len, samples, seed)
    data = Indexed(prefix)
    (low, high), *_ = split_documents(split, len(data))
    got = make_order(data.lengths, np.arange(low, high), seq_len, samples, seed)
    assert np.array_equal(got.documents, want.document_index)
    assert np.array_equal(got.shuffle, want.shuffle_index) and len(got) >= samples
    at, inside = got.place(np.arange(len(got)) * seq_len)
    assert np.array_equal(at, want.sample_index[:-1, 0]) and np.array_equal(
        inside, want.sample_index[:-1, 1]
    )
    return plan_epochs(int(data.lengths[low:high].sum()), seq_len, samples)


def test_orders_are_those_of_gpt_dataset(megatron, tmp_path):
    """One epoch, several epochs, and a separate last epoch. Seeds, lengths and splits, each with
    10,000 samples or more."""
    synthetic(tmp_path / "c", 0, 9000, 90)
    synthetic(tmp_path / "short", 1, 700, 60)
    kinds = [
        agree(megatron, tmp_path / "c", "1", 32, 12_000, 1234),
        agree(megatron, tmp_path / "c", "969,30,1", 16, 10_000, 7),
        agree(megatron, tmp_path / "c", "98,2", 64, 10_000, 0),
        agree(megatron, tmp_path / "c", "949,50,1", 30, 14_000, 99),
        agree(megatron, tmp_path / "short", "90,10", 17, 10_000, 3),
        agree(megatron, tmp_path / "short", "1", 8, 10_300, 3),
    ]
    assert {epochs == 1 for epochs, _ in kinds} == {apart for _, apart in kinds} == {True, False}


@pytest.mark.parametrize("mutant", ["share", "epochs", "seed"])
def test_another_rule_is_caught(megatron, tmp_path, monkeypatch, mutant):
    synthetic(tmp_path / "c", 1, 300, 60)
    agree(megatron, tmp_path / "c", "1", 8, 2_000, 3)
    if mutant == "share":
        monkeypatch.setattr(megatron_order, "APART", 0.7)
    elif mutant == "epochs":
        monkeypatch.setattr(megatron_order, "plan_epochs", lambda *a: (plan_epochs(*a)[0], False))
    else:
        shuffled = megatron_order._shuffled
        monkeypatch.setattr(
            megatron_order, "_shuffled", lambda v, random: shuffled(v, np.random.RandomState(3))
        )
    with pytest.raises(AssertionError):
        agree(megatron, tmp_path / "c", "1", 8, 2_000, 3)


@pytest.mark.slow
def test_orders_of_many_kinds_are_those_of_gpt_dataset(megatron, tmp_path):
    random = np.random.default_rng(5)
    kinds = set()
    for number in range(40):
        prefix = tmp_path / str(number)
        synthetic(prefix, number, int(random.integers(100, 20_000)), int(random.integers(3, 200)))
        split = ",".join(map(str, random.integers(1, 1000, int(random.integers(1, 4)))))
        seq_len, samples = int(random.integers(2, 70)), int(random.integers(10_000, 15_000))
        (low, high), *_ = split_documents(split, len(Indexed(prefix)))
        if Indexed(prefix).lengths[low:high].sum() > seq_len:
            kinds.add(agree(megatron, prefix, split, seq_len, samples, number))
    assert len(kinds) > 10 and {apart for _, apart in kinds} == {True, False}
