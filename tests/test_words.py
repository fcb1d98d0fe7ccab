"Longest matches against a loop; reads of two banks as one; votes for lines; what `streams` keeps."
import pytest, torch
import torch.nn.functional as F
from memnotes.core.sequence import Transformer
from memnotes.memory.attach import mix
from memnotes.memory.store import MemoryBank, Read
from memnotes.memory.words import copied, elected, joined, matched, streams

def loop(q, m):
    n = 0
    while n < min(len(q), len(m)) and q[-1-n] == m[-1-n]: n += 1
    return n

@pytest.mark.parametrize("t,n,letters", [(1, 1, 1), (1, 7, 2), (6, 3, 2), (9, 40, 3), (12, 25, 1)])
def test_match_lengths_are_a_loops(t, n, letters):
    torch.manual_seed(t + n)
    query, memory = torch.randint(letters, (3, t)), torch.randint(letters, (3, n))
    got = matched(query, memory)
    want = [[[loop(q[:i+1], m[:j+1]) for j in range(n)] for i in range(t)] for q,m in zip(query.tolist(), memory.tolist())]
    assert got.tolist() == want
    shared = matched(query, memory[:1])
    assert torch.equal(shared, matched(query, memory[:1].expand(3, -1)))

def test_negative_tokens_match_nothing():
    assert not matched(torch.tensor([[-1, 2, -1]]), torch.tensor([[-1, 2, -1, -2]]))[0,[0,2]].any()

def naive_cache(q, m, least):
    "Tokens that followed the longest match, newest first, and its length."
    lengths = [loop(q, m[:j+1]) for j in range(len(m) - 1)]
    best = max(lengths)
    return best, [m[j+1] for j in range(len(m) - 2, -1, -1) if lengths[j] == best] if best >= least else []

@pytest.mark.parametrize("least", [1, 2, 4])
def test_copies_are_a_naive_caches(least):
    torch.manual_seed(least)
    query, memory = torch.randint(3, (4, 6)), torch.randint(3, (4, 30))
    at = torch.tensor([[2, 5]]).expand(4, 2)
    found = copied(query, memory, at, k=30, least=least)
    for b in range(4):
        for i,t in enumerate((2, 5)):
            best, after = naive_cache(query[b,:t+1].tolist(), memory[b].tolist(), least)
            assert found.valid[b,i].any() == bool(after)
            assert found.values[b,i,:len(after),0].tolist() == after
            assert all(s == best for s in found.scores[b,i,:len(after)].tolist())

def test_one_memory_for_all_rows():
    query, memory, at = torch.randint(3, (4, 6)), torch.randint(3, (1, 30)), torch.full((4, 1), 5)
    for x,y in zip(copied(query, memory, at), copied(query, memory.expand(4, -1), at)): assert torch.equal(x, y)

def test_a_large_beta_copies_the_longest_match():
    found = copied(torch.tensor([[1, 2]]), torch.tensor([[5, 1, 2, 3, 9, 7, 2, 4]]), torch.tensor([[1]]))
    p = mix(torch.zeros(1, 1, 10), found, share=.9, beta=50.).exp()[0,0]
    assert p[3] == pytest.approx(.91, abs=1e-5) and p.sum() == pytest.approx(1, abs=1e-5)

def test_nothing_found_leaves_the_model_alone():
    logits = torch.randn(1, 1, 10)
    found = copied(torch.tensor([[8]]), torch.tensor([[1, 2, 3]]), torch.tensor([[0]]))
    assert not found.valid.any()
    torch.testing.assert_close(mix(logits, found, .9, 2.), logits.log_softmax(-1))

def test_two_banks_read_as_one():
    torch.manual_seed(0)
    keys, values, queries = F.normalize(torch.randn(2, 50, 8), dim=-1), torch.arange(100.).view(2, 50, 1), torch.randn(2, 3, 8)
    banks = [MemoryBank(8, 1, 50, batch=2) for _ in range(3)]
    for bank,part in zip(banks, (slice(0, 20), slice(20, 50), slice(0, 50))): bank.write(keys[:,part], values[:,part])
    a, b, both = (bank.read(queries, 16) for bank in banks)
    got = joined(a, b, 16)
    assert torch.equal(got.values, both.values) and got.valid.all()
    torch.testing.assert_close(got.scores, both.scores)

def test_a_read_of_nothing_joins():
    empty, full = MemoryBank(4, 2, 8), MemoryBank(4, 2, 8)
    full.write(torch.randn(1, 3, 4), torch.randn(1, 3, 2))
    queries = torch.randn(1, 2, 4)
    got = joined(empty.read(queries, 4), full.read(queries, 4), 4)
    assert got.valid.sum() == 6 and not got.scores[got.valid].isinf().any()

def test_votes_go_to_what_stands_out():
    line = torch.tensor([[[0, 1, 2, 3], [2, 0, 1, 3]]])
    scores = torch.tensor([[[.9, .9, .9, .9], [.8, .3, .2, .1]]])
    found = Read(torch.stack([torch.zeros(1, 2, 4), line.float()], -1), scores, torch.zeros(1, 2, 4).long(), torch.ones(1, 2, 4).bool())
    assert elected(found, torch.ones(1, 2).bool(), 4).tolist() == [2]
    with pytest.raises(ValueError, match="lines 0 to 2"): elected(found, torch.ones(1, 2).bool(), 3)

def test_streams_are_the_models_own():
    torch.manual_seed(0)
    model = Transformer(40, d_model=16, n_layers=3, n_heads=2).eval()
    tokens = torch.randint(40, (2, 7))
    kept, state = streams(model, tokens, [0, 2])
    assert set(kept) == {0, 2, "head"} and not model.blocks[0]._forward_hooks
    x = model.blocks[0](model.embed(tokens), None)[0]
    assert torch.equal(kept[0], x)
    torch.testing.assert_close(model.head(kept["head"]), model(tokens)[0])
    more, _ = streams(model, tokens[:,:2], [1], state)
    torch.testing.assert_close(model.head(more["head"]), model(torch.cat([tokens, tokens[:,:2]], 1))[0][:,7:], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("call,match", [
    (lambda: matched(torch.zeros(2, 3), torch.zeros(3, 4)), "b or 1"), (lambda: matched(torch.zeros(3), torch.zeros(3, 4)), "query, memory"),
    (lambda: copied(torch.zeros(1, 3), torch.zeros(1, 4), torch.zeros(1, 1).long(), k=0), "at least 1"),
    (lambda: copied(torch.zeros(1, 3), torch.zeros(1, 4), torch.zeros(1, 1).long(), least=0), "at least 1"),
    (lambda: streams(Transformer(9, d_model=8, n_layers=2, n_heads=2), torch.zeros(1, 2).long(), [2]), "blocks 0 to 1")])
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match): call()
