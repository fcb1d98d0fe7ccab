"The lens on models of others, its answers against float64, and what a user gets wrong."
import re

import pytest
import torch
from torch import nn

from memnotes.core.pretrained import random_twin, wrap
from memnotes.core.sequence import Transformer
from memnotes.inside.logit_lens import (FAMILIES, LogitLens, TunedLens, by_document, decompose, jackknife, plot, residuals, rotated, sensible_depth, skip_kl,
                                        skipping, to_html, train, transfer)

hf = pytest.importorskip("transformers")
small = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
FOREIGN = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**small, max_position_embeddings=64)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)),
}
every_foreign = pytest.mark.parametrize("name", FOREIGN)

def loud(model, by=4.):
    "Weights large enough for the layers to disagree; norms with gains of their own."
    for n,p in model.named_parameters(): p.data.mul_(by) if p.dim() > 1 else p.data.add_(.3*torch.randn_like(p))
    return model

@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    return loud(Transformer(97, 32, 4, 4, norm="rms", channel="swiglu", max_len=64)).eval().requires_grad_(False)

@pytest.fixture(scope="module")
def tokens(): return torch.randint(97, (5, 24), generator=torch.Generator().manual_seed(1))

# ---- models of others ----
@every_foreign
def test_last_layer_is_the_models_output(name, tokens):
    torch.manual_seed(0)
    model = wrap(loud(FOREIGN[name]()))
    lens, res = LogitLens(model), residuals(model, tokens)
    assert torch.equal(lens.read(res.last, 3), model(tokens)[0])
    result = lens.measure(res)
    assert result.kl.shape == (4, 5, 24) and (result.kl[-1] == 0).all() and result.kl[1].mean() > .01
    assert result.agree[-1].all() and not result.agree[0].all()

@every_foreign
def test_the_librarys_last_hidden_state_is_normalised_already(name, tokens):
    "Why the residuals are taken before the final norm: reading `hidden_states[-1]` normalises twice."
    torch.manual_seed(0)
    model = wrap(loud(FOREIGN[name]()))
    with torch.no_grad(): theirs = model.inner(tokens, output_hidden_states=True)
    lens, res = LogitLens(model), residuals(model, tokens)
    gap = lambda h: (lens.read(h, 3) - theirs.logits).abs().max()/theirs.logits.abs().max()
    assert gap(res.last) == 0 and gap(theirs.hidden_states[-1]) > 1e-2
    for i in range(3): assert torch.equal(res.stream[i], theirs.hidden_states[i])

@every_foreign
def test_contributions_sum_to_the_logit(name, tokens):
    torch.manual_seed(0)
    model = wrap(loud(FOREIGN[name]()))
    z = model(tokens)[0]
    names, shares = decompose(model, tokens, z.argmax(-1))
    assert len(names) == len(shares) == 2 + 2*3
    assert ((shares.sum(0) - z.amax(-1)).abs().max()/z.abs().max()).item() <= 1e-4

@every_foreign
def test_a_turned_model_is_the_same_function_in_other_axes(name, tokens):
    torch.manual_seed(0)
    model = wrap(loud(FOREIGN[name](), 2.))
    other, z = rotated(model), model(tokens)[0]
    assert ((other(tokens)[0] - z).abs().max()/z.abs().max()).item() <= 1e-4
    straight, turned = (residuals(m, tokens).stream for m in (model, other))
    assert torch.equal(straight[0], turned[0]) and (straight[1] - turned[1]).norm() > .5*straight[1].norm()
    assert torch.allclose(straight[1].norm(dim=-1), turned[1].norm(dim=-1), rtol=1e-3)

def test_a_random_twin_reads_otherwise(ours, tokens):
    kl = [LogitLens(m)(tokens, measures=("kl",)).kl for m in (ours, random_twin(ours, 1))]
    assert kl[0].shape == kl[1].shape and not torch.equal(*kl)

# ---- against float64, and across chunks ----
def test_divergences_are_those_of_float64(ours, tokens):
    got, res = LogitLens(ours, chunk=7)(tokens), residuals(ours, tokens)
    double = Transformer(97, 32, 4, 4, norm="rms", channel="swiglu", max_len=64).double()
    double.load_state_dict({n: p.double() for n,p in ours.state_dict().items()})
    with torch.no_grad(): q, p = (double.head(double.norm(h.double())).log_softmax(-1) for h in (res.stream, res.last))
    m = (p.exp() + q.exp())/2
    want = dict(kl=(p.exp()*(p - q)).sum(-1), entropy=-(q.exp()*q).sum(-1), tv=(p.exp() - q.exp()).abs().sum(-1)/2,
                js=-(m*m.log()).sum(-1) + ((p.exp()*p).sum(-1) + (q.exp()*q).sum(-1))/2)
    for name,v in want.items(): assert (getattr(got, name) - v).abs().max() <= 2e-4, name
    rank = 1 + (q > q.gather(-1, tokens.expand(5, 5, 24)[...,None])).sum(-1)
    assert torch.equal(got.rank["input"].long(), rank)
    after = -q[:,:,:-1].gather(-1, tokens[None,:,1:,None].expand(5, 5, 23, 1))[...,0]
    assert (got.ce[...,:-1] - after).abs().max() <= 2e-4 and got.ce[...,-1].isnan().all()

def test_a_translator_per_family_keeps_its_promise(ours, tokens):
    lens = LogitLens(ours)
    more = torch.randint(97, (40, 24), generator=torch.Generator().manual_seed(2))
    fit = residuals(ours, more)
    before = lens.measure(fit, measures=("kl",)).kl[:-1].mean()
    kl = {f: TunedLens(ours).fit(fit, f).measure(fit, measures=("kl",)).kl[:-1].mean().item() for f in FAMILIES}
    assert kl["affine"] < kl["orthogonal"] < before and kl["affine"] < kl["diagonal"] < before
    tuned = TunedLens(ours, layers=[1, 2]).fit(fit)
    lent = transfer(tuned, residuals(ours, tokens))
    assert torch.equal(lent[1,1], tuned(tokens, layers=[2], measures=("kl",)).kl[0]) and lent[0,1].mean() > lent[1,1].mean()
    assert all(p.requires_grad is False for p in train(tuned, fit, steps=2, rows=8).model.parameters())

def test_skipping_is_undone_and_skips_only_what_it_says(ours, tokens):
    last = residuals(ours, tokens, []).last
    lens, z = LogitLens(ours), ours(tokens)[0]
    assert skip_kl(lens, tokens, last, 1).mean() > 1e-3 and torch.equal(ours(tokens)[0], z)
    with pytest.raises(RuntimeError):
        with skipping(ours, 1, 1): raise RuntimeError
    assert torch.equal(ours(tokens)[0], z)

# ---- statistics ----
def test_intervals_hold_the_mean_and_shrink():
    draw = lambda n: torch.randn(1, n, 6, generator=torch.Generator().manual_seed(n)) + 3
    few, many = (by_document(draw(n)) for n in (10, 1000))
    for mid,low,high in (few, many): assert low < mid < high and low < 3.2 and high > 2.8
    assert (many[2] - many[1])*5 < few[2] - few[1]
    values = draw(64)[0].mean(-1)
    value, (low, high) = jackknife(lambda rows: values[rows].mean().item(), 64)
    assert value == pytest.approx(values.mean().item()) and (high - low)/2 == pytest.approx(1.96*values.std().item()/8, rel=.6)

def test_sensible_depth_is_where_half_is_crossed():
    assert sensible_depth([0, 1, 2, 4], torch.tensor([10., 8., 2., 0.]), 10) == pytest.approx(1.5/4)
    assert sensible_depth([0, 1, 2], torch.tensor([1., 1., 0.]), 10) == 0

# ---- what a user gets wrong ----
class Bytes:
    def encode(self, text): return [b % 97 for b in text.encode()]
    def decode(self, ids): return "".join(map(str, ids))

@pytest.mark.parametrize("given,words", [("", "empty"), ("   ", "empty"), ("a"*65, "context is 64"), ([], "t >= 1"), ([3, 97], "0 to 96: an unknown token"), ([-1], "unknown token"), ([.5], "expected integers")])
def test_bad_text(ours, given, words):
    with pytest.raises(ValueError, match=re.escape(words)): LogitLens(ours, Bytes())(given)

def test_text_without_a_tokenizer_and_wrong_options(ours, tokens):
    with pytest.raises(ValueError, match="no tokenizer"): LogitLens(ours)("text")
    with pytest.raises(ValueError, match="norm: got 'half'"): LogitLens(ours)(tokens, norm="half")
    with pytest.raises(ValueError, match="measures"): LogitLens(ours)(tokens, measures=("KL",))
    with pytest.raises(ValueError, match="layers: got"): LogitLens(ours)(tokens, layers=[5])
    with pytest.raises(ValueError, match="translators for"): TunedLens(ours, layers=[1])(tokens)
    with pytest.raises(ValueError, match="count"): skipping(ours, 3, 2).__enter__()
    with pytest.raises(ValueError, match="topk"): to_html(LogitLens(ours)(tokens, measures=("kl",)))

def test_a_model_without_a_final_norm(ours):
    odd = Transformer(97, 32, 1, 4)
    odd.norm = nn.Identity()
    with pytest.raises(ValueError, match="neither a LayerNorm nor an RMSNorm"): LogitLens(odd)
    with pytest.raises(ValueError, match="has no blocks, norm, head"): LogitLens(nn.Linear(3, 3))

def test_pictures_show_what_was_read(ours, tokens, tmp_path):
    import matplotlib.pyplot as plt
    result = LogitLens(ours, Bytes())(tokens[:1,:8])
    fig, ax = plt.subplots()
    plot(result, ax)
    assert len(ax.patches) == result.agree.sum().item()
    plt.close(fig)
    page = to_html(result, tmp_path/"lens.html")
    assert (tmp_path/"lens.html").read_text() == page and page.count("<td ") == 5*8 and not re.findall(r"(?:src|href)=|https?:", page)
