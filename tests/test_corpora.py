"Corpora: documents dealt out once, batches that are pure functions, tokens that are lossless, bytes that add up."
import gzip
import math
import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from memnotes.core import corpora as C, images as I, sources as S
from memnotes.core.corpora import Documents, TextCorpus, bpe, encode_documents, facts, split_documents, texts
from memnotes.core.images import ImageSet, read_idx, split_images

DOCS = {f"title {i}":f"Document {i}: naïve ☃ {'word '*(3*i)}end.\n" for i in range(40)}


@pytest.fixture(scope="module")
def tok(): return bpe()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "Sources where they are, derived files in a folder of the test."
    monkeypatch.setattr(C, "cache_root", lambda: tmp_path)
    return tmp_path


# texts

def test_bible():
    docs = texts("kjv")
    verses = sum(len([v for v in "\n".join(d.strip().split("\n\n")[1:]).split("\n")]) for d in docs.values())
    assert (len(docs), verses) == (66, 31_102)
    assert docs["Genesis"].startswith("Genesis\n\nIn the beginning God created the heaven and the earth.\n")
    assert not any(c in d for d in docs.values() for c in "<>[]&")


def test_factbook_prose_is_plain_and_nobody_is_lost():
    docs = texts("factbook")
    assert len(docs) == 256 and {"France", "World", "European Union", "Côte d'Ivoire", "Congo (Brazzaville)"} <= set(docs)
    markup = re.compile(r"</?(p|br|strong|em|a|div|span|li|ul)\b[^>]*>|&(nbsp|amp|ocirc|ndash|rsquo|quot);")
    assert not [t for t,d in docs.items() if markup.search(d)]
    for t,d in docs.items():
        paragraphs = d.strip().split("\n\n")
        assert paragraphs[0] == t and len(set(paragraphs)) == len(paragraphs)


def test_facts_are_real():
    known = {(f.country, f.field):f for f in facts()}
    assert known["Japan", "Capital: name"].value == "Tokyo"
    assert known["Algeria", "Area: total"].number == 2_381_740
    assert known["Iceland", "Country name: conventional short form"].number is None
    assert all(f.country and f.field and f.value and len(f.value) <= 200 and "<p>" not in f.value for f in known.values())


def test_standard_library_and_wrong_kinds():
    docs = texts("python-stdlib")
    assert "import" in docs["json/decoder.py"] and not [t for t in docs if "site-packages" in t or t.startswith("test/")]
    with pytest.raises(ValueError, match="source of images"): texts("digits")
    with pytest.raises(ValueError, match="did you mean 'kjv'"): texts("kjb")


def test_hub_texts(monkeypatch):
    import sys
    from types import SimpleNamespace
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"): texts("hf:datasets/some")
    class Rows(list): column_names = ["text"]
    asked = []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name: asked.append(name) or dict(train=Rows([dict(text="one"), dict(text=" ")]))))
    assert texts("hf:datasets/some") == {"train/0":"one"} and asked == ["some"]
    Rows.column_names = ["label"]
    with pytest.raises(ValueError, match="expected one named 'text'"): texts("hf:datasets/some")


# splits

@given(st.dictionaries(st.text(min_size=1, max_size=5), st.text(min_size=1, max_size=40), max_size=30))
@settings(max_examples=100, deadline=None)
def test_splits_are_disjoint_and_cover(docs):
    parts = split_documents(docs)
    assert sorted(t for ts in parts.values() for t in ts) == sorted(docs)
    assert all(parts.values()) or len(docs) < 3
    assert parts == split_documents(dict(reversed(docs.items())))


@pytest.mark.parametrize("name", ["kjv", "factbook"])
def test_shares_are_what_they_are_said_to_be(name):
    docs = texts(name)
    parts = split_documents(docs)
    size = {s:sum(len(docs[t].encode()) for t in ts) for s,ts in parts.items()}
    assert abs(size["test"]/sum(size.values()) - 0.1) < 0.02 and abs(size["validation"]/sum(size.values()) - 0.1) < 0.02


def test_documents_of_splits():
    corpus = TextCorpus(DOCS)
    assert sorted(d for s in ("train", "validation", "test") for d in corpus.documents(s)) == sorted(DOCS.values())
    with pytest.raises(ValueError, match="split='valid'"): corpus.documents("valid")


# tokens

@given(st.text())
@settings(max_examples=300, deadline=None)
def test_bpe_round_trip(tok, text):
    e = tok.encode(text)
    assert tok.decode(e.ids, skip_special_tokens=False) == text and 50256 not in e.ids


@given(st.lists(st.text(min_size=1), min_size=20, max_size=60))
@settings(max_examples=10, deadline=None)
def test_bytes_behind_bpe_tokens_add_up(tok, docs):
    ids, counts = encode_documents(dict(enumerate(docs)), tok)
    assert [sum(c) for c in counts] == [len(d.encode()) for d in docs] and all((c > 0).all() for c in counts)


def test_bpe_is_gpt2s(tok):
    assert tok.get_vocab_size() == 50_257
    assert tok.encode("Hello world! It's 2019.").ids == [15496, 995, 0, 632, 338, 13130, 13]


def test_bpe_equals_transformers(tok):
    transformers = pytest.importorskip("transformers")
    folder = S.path("gpt2-bpe")
    peer = transformers.GPT2Tokenizer(vocab=str(folder/"encoder.json"), merges=str(folder/"vocab.bpe"))
    text = texts("factbook")["France"] + " naïve ☃ 漢字\t\n  \x00"
    assert peer(text)["input_ids"] == tok.encode(text).ids


@given(st.text(min_size=1))
@settings(max_examples=100, deadline=None)
def test_bytes_add_up_for_any_tokenizer(text):
    "A tokenizer that loses case and blanks still has every byte behind one of its tokens."
    t = Tokenizer(models.WordLevel({"[UNK]":0, "a":1, "b":2}, "[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ids, counts = encode_documents({"a":text}, t)
    assert len(ids[0]) == len(counts[0]) and (not ids[0] or sum(counts[0]) == len(text.encode()))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_corpus_decodes_what_it_encodes(tokenizer, cache):
    corpus = TextCorpus(DOCS, tokenizer)
    for d in DOCS.values(): assert corpus.decode(corpus.encode(d)) == d
    assert corpus.encode("").shape == (0,)


def test_tokenised_once_and_made_again_if_damaged(cache, monkeypatch):
    first = TextCorpus(DOCS, "bpe")
    [file] = cache.rglob("*.npz")
    monkeypatch.setattr(C, "encode_documents", lambda *a: pytest.fail("encoded again"))
    second = TextCorpus(DOCS, "bpe")
    assert (first.ids == second.ids).all() and (first.bytes == second.bytes).all()
    monkeypatch.undo()
    monkeypatch.setattr(C, "cache_root", lambda: cache)
    file.write_bytes(file.read_bytes()[:100])
    assert (TextCorpus(DOCS, "bpe").ids == first.ids).all()
    TextCorpus(DOCS | {"title 0":"another"}, "bpe")
    assert len(list(cache.rglob("*.npz"))) == 2 and not list(cache.rglob("*.tmp"))


# batches

@pytest.fixture(params=["bytes", "bpe"])
def corpus(request, cache): return TextCorpus(DOCS, request.param, length=48, batch_size=8)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k,v in a.items())


def test_batch_is_pure(corpus):
    b = corpus.batch(0, "train", 0, 3)
    corpus.batch(5, "test", 1, 9)
    assert same(b, corpus.batch(0, "train", 0, 3)) and same(b, TextCorpus(DOCS, corpus.tokenizer or "bytes", length=48, batch_size=8, seed=7).batch(0, "train", 0, 3))
    others = [(1, "train", 0, 3), (0, "train", 1, 3), (0, "train", 0, 4), (0, "validation", 0, 3)]
    assert not any(torch.equal(b["tokens"], corpus.batch(*o)["tokens"]) for o in others)


def test_batch_keeps_the_contract(corpus):
    for split in ("train", "validation", "test"):
        b = corpus.batch(0, split, 0, 0)
        for k in ("tokens", "targets", "n_bytes", "document"): assert b[k].shape == (8, 48) and b[k].dtype == torch.int64
        assert b["mask"].dtype == torch.bool and b["mask"].any() and (b["position"], b["step"], b["last"]) == (0, 0, True)
        assert b["tokens"].min() >= 0 and max(b["tokens"].max(), b["targets"].max()) < corpus.vocab == len(corpus.names)
        inside = b["mask"][:,1:]
        assert torch.equal(b["tokens"][:,1:][inside], b["targets"][:,:-1][inside])
        assert ((b["n_bytes"] > 0) <= b["mask"]).all() and torch.equal(b["document"] >= 0, b["mask"])
        for row in range(8):
            titles = {corpus.titles[i] for i in b["document"][row][b["mask"][row]]}
            assert len(titles) == 1 and titles <= set(corpus.splits[split])
            assert corpus.decode(b["targets"][row][b["mask"][row]]).strip("\ufffd") in corpus.docs[titles.pop()]


@pytest.mark.parametrize("window", [1, 7, 48, 100])
def test_windows_join_to_the_batch(corpus, window):
    whole, parts = corpus.batch(2, "train", 1, 5), list(corpus.windows(2, "train", 1, 5, window))
    for k in ("tokens", "targets", "mask", "n_bytes", "document"): assert torch.equal(torch.cat([p[k] for p in parts], 1), whole[k])
    assert [p["position"] for p in parts] == list(range(0, 48, window)) and [p["last"] for p in parts] == [False]*(len(parts) - 1) + [True]


def test_stretches_cover_a_document_evenly():
    "Every target of a long document is drawn; a document is drawn in proportion to its length."
    corpus = TextCorpus({"a":"x"*3000, "b":"y"*1000, "c":"z", "d":"w"}, length=10, batch_size=4000)
    docs = corpus.rows["train"]
    b = corpus.batch(0, "train", 0, 0)
    share = np.array([(b["document"][:,0] == d).float().mean() for d in docs])
    assert np.allclose(share, corpus.targets[docs]/corpus.targets[docs].sum(), atol=0.03)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_stream_counts_every_byte_once(corpus, split):
    windows = list(corpus.stream(split, 16, rows=3))
    assert sum(w["n_bytes"].sum().item() for w in windows) == sum(len(d.encode()) for d in corpus.documents(split))
    read = {}
    for w in windows:
        assert w["tokens"].shape[1] <= 16
        for row,mask,document in zip(w["targets"], w["mask"], w["document"]):
            if mask.any(): read.setdefault(corpus.titles[document[0]], []).extend(row[mask].tolist())
    assert {t:corpus.decode(torch.tensor(ids)) for t,ids in read.items()} == {t:DOCS[t] for t in corpus.splits[split]}
    starts = [w["position"] == 0 for w in windows]
    assert sum(starts) == math.ceil(len(corpus.documents(split))/3) == sum(w["last"] for w in windows)


def test_bits_per_byte_of_a_uniform_model(cache):
    "A model that gives every token 1/V costs log2(V) bits a token: 8.0056 bits a byte on bytes, and a quarter as many counts on BPE."
    for tokenizer in ("bytes", "bpe"):
        corpus = TextCorpus(texts("kjv") if tokenizer == "bytes" else DOCS, tokenizer, length=64, batch_size=16)
        b = corpus.batch(0, "test", 0, 0)
        loss = torch.nn.functional.cross_entropy(torch.zeros(16*64, corpus.vocab), b["targets"].flatten(), reduction="none").view(16, 64)
        bpb = (loss*b["mask"]).sum()/math.log(2)/b["n_bytes"].sum()
        assert abs(bpb.item() - math.log2(corpus.vocab)*b["mask"].sum().item()/b["n_bytes"].sum().item()) < 1e-4
    assert abs(TextCorpus(DOCS, "bytes").bytes_per_token("train") - 1) < 1e-12
    text = "".join(DOCS[t] for t in corpus.splits["train"])
    n = sum(len(corpus.encode(DOCS[t])) for t in corpus.splits["train"])
    assert abs(corpus.bytes_per_token("train") - len(text.encode())/n) < 1e-12


def test_a_tokenizer_without_a_mark(cache):
    t = Tokenizer(models.WordLevel({"[UNK]":0, "word":1, "end":2}, "[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    corpus = TextCorpus(DOCS, t, length=8)
    assert corpus.mark is None and corpus.vocab == 3
    assert corpus.batch(0, "train", 0, 0)["mask"].any()
    class Wrapped: backend_tokenizer = t
    assert TextCorpus(DOCS, Wrapped(), length=8).vocab == 3


@pytest.mark.parametrize("make,said", [
    (lambda: TextCorpus({}), "no document"), (lambda: TextCorpus({"a":""}), "an empty one"), (lambda: TextCorpus(DOCS, "words"), "tokenizer='words'"),
    (lambda: TextCorpus(DOCS, length=0), "length=0"), (lambda: TextCorpus(DOCS).batch(0, "dev", 0, 0), "split='dev'"),
    (lambda: TextCorpus({"a":"b"}).batch(0, "test", 0, 0), "three splits need 3"), (lambda: TextCorpus({"a":"b"}).bytes_per_token("test"), "three splits need 3"),
    (lambda: list(TextCorpus(DOCS).stream("test", 0)), "window=0"), (lambda: ImageSet("digit"), "name='digit'"), (lambda: ImageSet("digits", levels=18), "levels=18"),
    (lambda: ImageSet("digits", levels=1), "levels=1")])
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said): make()


def test_a_wrong_tokenizer_is_a_type_error():
    with pytest.raises(TypeError, match="got int"): TextCorpus(DOCS, 3)


def test_lightning_trains_on_a_corpus():
    import lightning as L
    seen = []
    class Count(L.LightningModule):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(()))
        def training_step(self, batch, i): seen.append((batch["step"], batch["position"], tuple(batch["tokens"].shape))); return self.w**2
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
    corpus = TextCorpus(DOCS, length=48, batch_size=2, window=32)
    L.Trainer(max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu").fit(Count(), corpus)
    assert seen == [(0, 0, (2, 32)), (0, 32, (2, 16)), (1, 0, (2, 32))]


# images

def test_digits():
    digits = ImageSet("digits", batch_size=5)
    n = {s:len(digits.labels(s)) for s in ("train", "validation", "test")}
    assert sum(n.values()) == 1797 and sorted(np.concatenate(list(digits.splits.values()))) == list(range(1797))
    x = digits.images("train")
    assert x.shape == (n["train"], 1, 8, 8) and x.dtype == torch.float32 and (x.min(), x.max()) == (0, 1)
    assert torch.equal((x*16).long().flatten(1), digits.tokens("train"))
    b = digits.batch(0, "train", 0, 0)
    assert same(b, digits.batch(0, "train", 0, 0)) and b["tokens"].shape == (5, 64) and digits.vocab == 18
    assert (b["tokens"][:,0] == 17).all() and torch.equal(b["tokens"][:,1:], b["targets"][:,:-1])
    rows = b["index"][:,0]
    assert torch.equal(digits.tokens("train")[rows], b["targets"]) and torch.equal(digits.labels("train")[rows], b["label"][:,0])
    joined = torch.cat([w["targets"] for w in digits.windows(0, "train", 0, 0, 10)], 1)
    assert torch.equal(joined, b["targets"]) and not torch.equal(b["tokens"], digits.batch(0, "train", 1, 0)["tokens"])


@pytest.mark.parametrize("levels", [2, 3, 17])
def test_levels_are_equally_wide_and_monotone(levels):
    digits = ImageSet("digits", levels=levels)
    fine, coarse = ImageSet("digits").tokens("test").flatten(), digits.tokens("test").flatten()
    assert coarse.min() == 0 and coarse.max() == levels - 1 and digits.vocab == levels + 1
    for a in range(16): assert coarse[fine == a].max() <= coarse[fine == a + 1].min()


def test_classes_are_dealt_alike():
    labels = np.repeat(np.arange(5), 100)
    parts = split_images(labels)
    assert all((np.bincount(labels[parts[s]]) == n).all() for s,n in dict(train=80, validation=10, test=10).items())
    parts = split_images(labels, published=450)
    assert parts["test"].tolist() == list(range(450, 500)) and max(parts["train"]) < 450


def idx(array): return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_idx_files(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (7, 4, 3), np.uint8)
    file = tmp_path/"x.gz"
    file.write_bytes(gzip.compress(idx(x)))
    assert (read_idx(file) == x).all()
    for wrong,said in ((b"\0\0\x0d\x01" + bytes(4), "no idx file of bytes"), (b"", "no idx file"), (idx(x)[:-1], "shape")):
        file.write_bytes(gzip.compress(wrong))
        with pytest.raises(ValueError, match=said): read_idx(file)


def test_fashion_from_files_of_its_format(tmp_path, monkeypatch):
    "The reader on small files of the published format: the published test set stays the test set."
    rng = np.random.default_rng(0)
    for part,n in (("train", 60_000), ("t10k", 50)):
        y = (np.arange(n) % 10).astype(np.uint8)
        (tmp_path/f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y), 1))
        (tmp_path/f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(rng.integers(0, 256, (n, 2, 2), np.uint8)), 1))
    monkeypatch.setattr(I, "path", lambda name: tmp_path)
    clothes = ImageSet("fashion-mnist", levels=16)
    assert {s:len(clothes.labels(s)) for s in clothes.splits} == dict(train=54_000, validation=6_000, test=50)
    assert clothes.images("test").shape == (50, 1, 2, 2) and clothes.batch(0, "test", 0, 0)["tokens"].max() <= 16


@pytest.mark.skipif(not S.present("fashion-mnist"), reason="optional source: memnotes fetch fashion-mnist")
def test_fashion():
    clothes = ImageSet("fashion-mnist", levels=16)
    assert {s:len(clothes.labels(s)) for s in clothes.splits} == dict(train=54_000, validation=6_000, test=10_000)
    assert (torch.bincount(clothes.labels("validation")) == 600).all() and clothes.images("test").shape == (10_000, 1, 28, 28)


def test_padding_never_reads_another_document():
    docs = Documents({"a":"ab", "b":"cdef"})
    got = docs.read(np.array([0, 1]), np.array([0, 2]), 5)
    assert got["mask"].sum(1).tolist() == [2, 2] and set(got["tokens"][0].tolist()) <= {256, 97, 98}
    assert got["targets"][1][got["mask"][1]].tolist() == [ord("e"), ord("f")] and got["n_bytes"].sum() == 4
