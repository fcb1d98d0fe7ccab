"Exams in brackets and the marks of real code: exact on machines that know, errors for what cannot be asked."
import io
import tokenize

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from memnotes.core.cells import Recurrent
from memnotes.core.corpora import texts
from memnotes.core.tasks import Brackets
from memnotes.horizon.brackets import apart_by, auc, closings, endings
from memnotes.horizon.code import close_rightly, closing_marks


@settings(max_examples=25, deadline=None, derandomize=True)
@given(distance=st.integers(1, 70), pairs=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_pair_is_as_far_apart_as_asked(distance, pairs, seed):
    batch = apart_by(distance, pairs, batch_size=3).batch(seed, "test", 0, 0)
    assert batch["mask"].any(1).all() and (batch["distance"][batch["mask"]] == distance).all()
    assert (batch["depth"][batch["mask"]] == 1).all()


@pytest.mark.parametrize("window", [1, 7, 64])
def test_windows_do_not_change_the_answers(window):
    task = Brackets(length=64, batch_size=3)
    torch.manual_seed(0)
    model = Recurrent("gru", task.vocab, 8).double()
    one, cut = closings(model, task, window=64), closings(model, task, window=window)
    key = ["distance", "depth", "right"]
    assert one[key].sort_values(key).to_numpy().tolist() == cut[key].sort_values(key).to_numpy().tolist()
    whole, pieces = endings(model, task, window=64), endings(model, task, window=window)
    assert (whole.may_end == pieces.may_end).all() and (whole.deepest == pieces.deepest).all()
    assert np.allclose(whole.score, pieces.score, rtol=0, atol=1e-12)


def test_the_deepest_level_is_that_of_the_expression():
    "Against a walk through the tokens, one by one."
    task = Brackets(max_depth=6, length=200, batch_size=2, filler=0)
    model = Recurrent("rnn", task.vocab, 4)
    batch, expected = task.batch(0, "test", 0, 0), []
    for row in batch["tokens"].tolist():
        level, top, open_ = 0, 0, False
        for x in row:
            if x < 3: level, open_ = level+1, True
            elif x < 6: level -= 1
            else: level, top, open_ = 0, 0, False
            top = max(top, level)
            if open_: expected.append((level == 0, top))
    assert list(zip(*(endings(model, task, seed=0)[c].tolist() for c in ("may_end", "deepest")))) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30).filter(lambda x: len({b for _,b in x}) == 2))
@settings(deadline=None, derandomize=True)
def test_auc_is_the_share_of_pairs(pairs):
    score, positive = zip(*pairs)
    wins = [(a > b) + (a == b)/2 for a,p in pairs if p for b,q in pairs if not q]
    assert abs(auc(score, positive) - np.mean(wins)) < 1e-12


def test_marks_are_those_of_pythons_tokenizer():
    library = texts("python-stdlib")
    for name in [n for n in library if library[n].isascii()][::40]:
        text, marks = library[name], closing_marks(library[name].encode())
        starts = np.cumsum([0] + [len(line) for line in text.splitlines(True)])
        ops = [int(starts[t.start[0]-1] + t.start[1]) for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.OP and t.string in ")]}"]
        assert marks[marks["kind"] == "bracket"]["at"].tolist() == ops, name
        assert all(text[a] == chr(m) for a,m in zip(marks["at"], marks["mark"]))


def test_marks_in_strings_and_comments_do_not_count():
    marks = closing_marks(b"f(')', \"]\") # (\nx = '''a(''' + r'\\'' + [1]\n".replace(b"r'\\'' + ", b""))
    assert marks[marks["kind"] == "bracket"]["mark"].tolist() == [ord(")"), ord("]")]
    assert marks[marks["kind"] == "quote"]["mark"].tolist() == [ord("'"), ord('"'), ord("'")]


def test_whole_memory_is_a_long_memory():
    torch.manual_seed(0)
    model, source = Recurrent("gru", 257, 8), b"a = [f(1), {'k': (2, 3)}]\n"*3
    marks = closing_marks(source)
    assert torch.equal(close_rightly(model, source, marks), close_rightly(model, source, marks, len(source) + 1, chunk=4))
    assert close_rightly(model, source, marks[:0], 8).shape == (0,)


@pytest.mark.parametrize("wrong, said", [
    (lambda: apart_by(0), "distance=0"), (lambda: apart_by(3, 0), "pairs=0"), (lambda: auc([1., 2.], [True, True]), "expected some of each"),
    (lambda: closings(Recurrent("rnn", 5, 4), Brackets()), "vocab"), (lambda: closings(Recurrent("rnn", 11, 4), Brackets(length=8), window=0), "window"),
    (lambda: closing_marks(b"f(x]"), "closes nothing"), (lambda: closing_marks(b")"), "closes nothing"), (lambda: closing_marks(b"(("), "never closed"),
    (lambda: close_rightly(Recurrent("rnn", 257, 4), b"()", closing_marks(b"()"), 0), "memory: expected at least 1")])
def test_errors_say_what_is_wrong(wrong, said):
    with pytest.raises(ValueError, match=said): wrong()
