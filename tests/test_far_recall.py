"Far recall: frozen embeddings, filing without reading, shared shelves, memories of fixed size – against plain definitions, and their errors."
import pytest
import torch
import torch.nn.functional as F

from memnotes.core.sequence import Block, SequenceModel, nbytes
from memnotes.core.tasks import AssociativeRecall
from memnotes.memory.far_recall import KeyedMemory, RecurrentMemory, ShortConv, carried_recall
from memnotes.memory.keying import BankTransformer
from memnotes.memory.shelves import Book, Shelves, far_recall, file_away, freeze_embeddings, table_recall
from memnotes.memory.store import MemoryBank


def task(distance=99, n=8, words=64, **kwargs):
    return AssociativeRecall(words, 16, n, n, distance, batch_size=1, distractor=kwargs.pop("distractor", "rival"), **kwargs)


def bank_model(vocab, window=6, n_layers=1, **kwargs):
    torch.manual_seed(0)
    model = BankTransformer(vocab, 16, n_layers, 2, window=window, k=8, capacity=1 << 20, channel=None, gate="free", tied=False, **kwargs)
    return freeze_embeddings(model).double().eval()


def test_frozen_embeddings_are_unit_vectors_that_no_update_touches():
    model = bank_model(50)
    torch.testing.assert_close(model.embed.weight.norm(dim=-1), torch.ones(50, dtype=torch.double), atol=1e-6, rtol=0)
    assert not model.embed.weight.requires_grad and model.head.weight.requires_grad
    assert torch.equal(model.head.weight, model.embed.weight)
    before, model = model.embed.weight.clone(), model.train()
    model(torch.arange(12)[None])[0].sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.).step()
    assert torch.equal(before, model.embed.weight) and not torch.equal(before, model.head.weight)


@pytest.mark.parametrize("cosine", [.3, .8, 1.])
def test_synonyms_are_near(cosine):
    model = SequenceModel(4000, 64, [Block(ShortConv(64))], tied=False)
    e = freeze_embeddings(model, synonyms=(100, 1900), cosine=cosine).embed.weight
    got = (e[100:2000]*e[2000:3900]).sum(-1).mean().item()
    assert abs(got - cosine) < .02


@pytest.mark.parametrize("kwargs, message", [(dict(cosine=0.), "cosine: expected above 0"), (dict(cosine=1.1), "cosine"), (dict(synonyms=(40, 20)), "synonyms: expected"), (dict(synonyms=(0, 0)), "synonyms")])
def test_frozen_embeddings_refuse(kwargs, message):
    with pytest.raises(ValueError, match=message): freeze_embeddings(bank_model(50), **kwargs)


@pytest.mark.parametrize("asked", ["exact", "reordered", "corrupted", "paraphrased"])
def test_book_is_the_task_cut_up(asked):
    t = task(80 if asked == "corrupted" else 99, asked=asked, key_tokens=3 if asked == "corrupted" else 2)
    w, book = t.width, Book(t, 3, 4)
    whole = t.span(3, "test", 0, 0, 0, t.length)
    assert torch.equal(book.facts.flatten(), whole["tokens"][0, :8*w])
    assert torch.equal(torch.cat(list(book.middle(0, t.distance, 17)), 1)[0], whole["tokens"][0, 8*w:8*w+t.distance])
    asked_once = sorted(map(tuple, whole["tokens"][0, 8*w+t.distance:].view(-1, w).tolist()))
    assert sorted(map(tuple, book.asked.view(-1, w).tolist())) == asked_once
    for facts, answers in zip(book.facts.view(4, -1, w), book.answers): # each row is asked its own facts
        assert sorted(facts[:, -1].tolist()) == sorted(answers.tolist())
    assert book.where.tolist() == list(range(w-2, 2*w, w))
    right = F.one_hot(book.answers, t.vocab).double().repeat_interleave(w, 1)
    assert book.right(right) == 1.


@pytest.mark.parametrize("make, message", [(lambda: Book(task(), 0, 3), "divisor of n_pairs=8"), (lambda: Book(task(), 0, 0), "rows"), (lambda: Book(task(100), 0), "multiple of 3"),
    (lambda: Book(AssociativeRecall(64, 16, 8, 2, 99, distractor="rival", batch_size=1), 0), "every fact asked"), (lambda: Book(AssociativeRecall(64, 16, 8, 8, 99, distractor="rival"), 0), "batch_size=1")])
def test_book_refuses(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize("pieces", [[60], [1]*60, [25, 35]])
def test_filing_is_what_a_forward_pass_files(pieces):
    model, tokens = bank_model(50), torch.randint(50, (3, 60), generator=torch.Generator().manual_seed(0))
    bank, recent = MemoryBank(16, 16, 99, 3, torch.double), None
    for piece in tokens.split(pieces, 1): recent = file_away(model, piece, bank, recent)
    with torch.no_grad(): other, = model(tokens)[1].banks
    n = other.size
    assert n == 60 - 5
    torch.testing.assert_close(bank.keys[:, :n], other.keys[:, :n], atol=1e-12, rtol=0)
    torch.testing.assert_close(bank.values[:, :n], other.values[:, :n], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kwargs", [dict(n_layers=2), dict(keying="separate"), dict(keying="separate+conv")])
def test_filing_refuses_what_depends_on_reading(kwargs):
    with pytest.raises(ValueError, match="one layer with shifted keys"):
        file_away(bank_model(50, **kwargs), torch.zeros(1, 4, dtype=torch.long), MemoryBank(16, 16, 9, 1, torch.double))


def test_shelves_read_as_one_bank():
    g, k = torch.Generator().manual_seed(0), 7
    draw = lambda *n: torch.randn(*n, 4, generator=g, dtype=torch.double)
    own, shared, whole = MemoryBank(4, 4, 50, 3, torch.double), MemoryBank(4, 4, 50, 1, torch.double), MemoryBank(4, 4, 50, 3, torch.double)
    for bank, keys, values in ((own, draw(3, 5), draw(3, 5)), (shared, draw(1, 30), draw(1, 30))):
        bank.write(keys, values), whole.write(keys.expand(3, -1, -1), values.expand(3, -1, -1))
    q, shelves = draw(3, 6), Shelves(shared, own)
    got, want = shelves.read(q, k), whole.read(q, k)
    for name in ("scores", "values", "valid"): torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-12, rtol=0)
    assert (shelves.written, shelves.size, shelves.batch) == (35, 35, 3)
    shelves.asked = torch.tensor([1, 4])
    some = shelves.read(q, k)
    torch.testing.assert_close(some.scores[:, [1, 4]], got.scores[:, [1, 4]], atol=1e-12, rtol=0)
    assert not some.valid[:, [0, 2, 3, 5]].any()
    assert (some.values[:, 0] == 0).all() and (some.scores[:, 0] == -torch.inf).all() and (some.ids[:, 0] == -1).all()


def test_shelves_refuse():
    bank = lambda d, b: MemoryBank(d, d, 9, b)
    with pytest.raises(ValueError, match="shared: expected a bank of one row; got 2"): Shelves(bank(4, 2), bank(4, 2))
    with pytest.raises(ValueError, match="own: expected keys and values of the shared widths 4, 4"): Shelves(bank(4, 1), bank(5, 2))
    with pytest.raises(ValueError, match="oldest: shelves forget nothing"): Shelves(bank(4, 1), bank(4, 2)).read(torch.zeros(2, 1, 4), 1, torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("window", [7, 256])
def test_far_recall_is_a_pass_over_each_rows_text(window):
    book = Book(task(), 1, 2)
    model = bank_model(book.task.vocab)
    got = far_recall(model, book, [30, 99], window)
    for r in got:
        text = torch.cat([book.facts, torch.cat(list(book.middle(0, r["distance"])), 1).expand(2, -1), book.asked], 1)
        with torch.no_grad(): want = model(text)[0][:, -24//2:]
        torch.testing.assert_close(r["logits"][:, book.where], want[:, book.where], atol=1e-10, rtol=0)
        assert r["recall"] == book.right(want)
    assert got[1]["bytes"] > got[0]["bytes"] > 0


@pytest.mark.parametrize("distances", [[], [5], [60, 30], [30, 30], [30, 120]])
def test_distances_are_checked(distances):
    book = Book(task(), 1, 2)
    with pytest.raises(ValueError, match="distances: expected rising numbers"): far_recall(bank_model(book.task.vocab), book, distances)
    if distances != [5]:
        with pytest.raises(ValueError, match="distances: expected rising numbers"): carried_recall(RecurrentMemory(book.task.vocab, 16, 2), book, distances)


def test_a_table_knows_exact_keys_only():
    assert table_recall(Book(task(999, 16), 0, 4), 999) == 1.
    for kind, words in (("corrupted", 3), ("reordered", 2), ("paraphrased", 2)):
        t = task(40*(words+1), 16, asked=kind, key_tokens=words)
        assert table_recall(Book(t, 0, 4), t.distance) < .4
    with_repeats = Book(AssociativeRecall(8, 16, 8, 8, 3000, batch_size=1, distractor="repeat"), 0, 1)
    assert table_recall(with_repeats, 3000) == 1. # the last entry counts, as in the task


def in_pieces(mixer, x, sizes):
    out, state = [], None
    for piece in x.split(sizes, 1):
        y, state = mixer(piece, state)
        out.append(y)
    return torch.cat(out, 1), state


@pytest.mark.parametrize("memory", ["window", "linear"])
def test_keyed_memory_is_its_definition(memory):
    torch.manual_seed(0)
    m, x = KeyedMemory(8, memory, window=5).double(), torch.randn(2, 23, 8, dtype=torch.double)
    past = F.pad(x, (0, 0, 3, 0))
    q = F.normalize(m.look(sum(m.taps[i]*past[:, i+1:i+24] for i in range(3))), dim=-1)
    keys, want = torch.cat([torch.zeros_like(q[:, :1]), q[:, :-1]], 1), []
    for t in range(23):
        first = max(0, t-4) if memory == "window" else 0
        score = (keys[:, first:t+1] @ q[:, t, :, None])[..., 0]
        p = (m.log_beta.exp()*score).softmax(-1) if memory == "window" else score
        read = (p[..., None]*x[:, first:t+1]).sum(1)
        want.append(m.output(read if memory == "window" else F.rms_norm(read, (8,))))
    for sizes in (23, [10, 1, 12], [1]*23):
        torch.testing.assert_close(in_pieces(m, x, sizes)[0], torch.stack(want, 1), atol=1e-10, rtol=0)


def test_sizes_of_states_do_not_grow():
    x = torch.randn(2, 300, 8)
    for m in (KeyedMemory(8, "window", 64), KeyedMemory(8, "linear"), ShortConv(8)):
        assert nbytes(m(x)[1]) == nbytes(m(x[:, :100])[1])


def test_recurrent_memory_sees_the_past_through_its_memory_alone():
    torch.manual_seed(0)
    model, x = RecurrentMemory(30, 16, 2, n_memory=3, segment=8).double().eval(), torch.randint(30, (2, 40), generator=torch.Generator().manual_seed(1))
    whole, state = model(x)
    torch.testing.assert_close(in_pieces(model, x, [8, 16, 16])[0], whole, atol=1e-10, rtol=0)
    assert state["memory"].shape == (2, 3, 16) and model.segment == 8
    changed = x.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 30
    assert not torch.equal(model(changed)[0][:, 20:], whole[:, 20:])
    _, s = model(x[:, :16])
    a = model(x[:, 16:], dict(memory=model.memory.expand(2, -1, -1), recent=s["recent"]))[0]
    _, other = model(changed[:, :16])
    b = model(x[:, 16:], dict(memory=model.memory.expand(2, -1, -1), recent=other["recent"]))[0]
    assert torch.equal(a, b)


def test_carried_recall_jumps_where_nothing_older_is_seen():
    book = Book(task(600, 16), 0, 2)
    torch.manual_seed(0)
    model = freeze_embeddings(SequenceModel(book.task.vocab, 16, [Block(KeyedMemory(16, "window", 64))], tied=False)).double()
    all_, jumped = (carried_recall(model, book, [99, 600], recent, 50) for recent in (None, 200))
    assert [r["recall"] for r in all_] == [r["recall"] for r in jumped]
    assert all_[0]["bytes"] == all_[1]["bytes"]


@pytest.mark.parametrize("make, message", [(lambda: ShortConv(0), "d_model, span"), (lambda: ShortConv(4, 1), "d_model, span"), (lambda: KeyedMemory(4, "bank"), "memory: expected 'window' or 'linear'; got 'bank'"),
    (lambda: KeyedMemory(4, window=0), "window"), (lambda: RecurrentMemory(9, 8, 2, n_memory=0), "n_memory, segment"), (lambda: RecurrentMemory(9, 8, 2, segment=0), "n_memory, segment")])
def test_models_refuse(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_recurrent_memory_checks_its_tokens():
    model = RecurrentMemory(9, 8, 2)
    with pytest.raises(ValueError, match="tokens: expected 0 to 8"): model(torch.full((1, 3), 9))
    with pytest.raises(TypeError, match="tokens"): model(torch.zeros(1, 3))
    state = model(torch.zeros(2, 3, dtype=torch.long))[1]
    with pytest.raises(ValueError, match="expected batch 2, that of the state"): model(torch.zeros(3, 3, dtype=torch.long), state)
