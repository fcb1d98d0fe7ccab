"""What every mixer, cell and model promises, from one suite: a new one is one line in MIXERS or MODELS."""
import copy
import os

import pytest
import torch
from hypothesis import given, settings, strategies as st

from memnotes.attention.convolution import CausalRelativeAttention
from memnotes.attention.hopfield import CausalHopfield
from memnotes.core.cells import CELLS, GRU, LSTM, RNN, MinGRU, Recurrent
from memnotes.core.sequence import (Attention, Block, MLP, SequenceModel, SwiGLU, Transformer,
                                    detach, generate, is_store, leaves, nbytes, select)
from memnotes.horizon.forms import FEATURE_MAPS, DeltaRule, GatedLinearAttention, LinearAttention
from memnotes.horizon.linear_attention import Shift
from memnotes.horizon.units import RateRNN
from memnotes.inside.all_attention import AllAttention, PersistentAttention
from memnotes.memory.far_recall import KeyedMemory, ShortConv

D, VOCAB, T = 8, 11, 12
LONG = os.environ.get("LONG") == "1"

MIXERS = { # name -> mixer of width D
    "attention-rope": lambda: Attention(D, 2),
    "attention-none": lambda: Attention(D, 2, positions="none"),
    "attention-gqa": lambda: Attention(D, 4, n_kv_heads=2, bias=True),
    "attention-qk-norm": lambda: Attention(D, 2, n_kv_heads=1, qk_norm=True),
    "attention-window-1": lambda: Attention(D, 2, window=1),
    "attention-window-3": lambda: Attention(D, 2, window=3),
    "attention-window-5-none": lambda: Attention(D, 2, window=5, positions="none"),
    **{name: (lambda make=make: make(D)) for name,make in CELLS.items()},
    **{name+"-narrow": (lambda make=make: make(D, 5)) for name,make in CELLS.items()},
    "rnn-relu": lambda: RNN(D, nonlinearity="relu"),
    "gru-chrono": lambda: GRU(D, chrono=50),
    "lstm-chrono": lambda: LSTM(D, chrono=50),
    "mingru-tanh": lambda: MinGRU(D, candidate="tanh", chrono=50),
    "mingru-stretched": lambda: MinGRU(D, stretch=1e-3),
    "rate-rnn": lambda: RateRNN(D),
    "rate-rnn-sparse": lambda: RateRNN(D, 6, degree=2, leak=.5),
    "shift": lambda: Shift(D),
    "relative": lambda: CausalRelativeAttention(D, 3),
    "relative-prefix": lambda: CausalRelativeAttention(D, 2, prefix=3, bias=False),
    "hopfield": lambda: CausalHopfield(D, 2),
    "hopfield-three-updates": lambda: CausalHopfield(D, 2, beta=[.5, 2.], n_updates=3),
    "hopfield-sparse-connected": lambda: CausalHopfield(D, 2, d_head=6, alpha=2., n_updates=2, connected=True),
    "persistent": lambda: PersistentAttention(D, 2, 5),
    "persistent-none": lambda: PersistentAttention(D, 4, 3, positions="none", reparametrised=False),
    "persistent-window-3": lambda: PersistentAttention(D, 2, 5, window=3),
    **{f"linear-{name}": (lambda name=name: LinearAttention(D, 2, name, chunk=5)) for name in FEATURE_MAPS},
    "linear-parallel": lambda: LinearAttention(D, 2, d_key=3, form="parallel"),
    "linear-recurrent": lambda: LinearAttention(D, 2, "taylor2", d_key=2, form="recurrent"),
    **{decay: (lambda decay=decay: GatedLinearAttention(D, 2, decay, chunk=5)) for decay in ("gla", "retnet")},
    "delta-rule": lambda: DeltaRule(D, 2, chunk=5),
    "delta-rule-parallel": lambda: DeltaRule(D, 4, d_key=3, form="parallel"),
    "short-conv": lambda: ShortConv(D),
    "keyed-window": lambda: KeyedMemory(D, "window", window=5),
}
MODELS = { # name -> model over VOCAB tokens
    "transformer": lambda: Transformer(VOCAB, D, 2, 2),
    "gpt2-like": lambda: Transformer(VOCAB, D, 2, 2, positions="learned", max_len=20, bias=True, dropout=.1),
    "llama-like": lambda: Transformer(VOCAB, 12, 2, 6, 2, 20, norm="rms", channel="swiglu", rope_base=1e5, max_len=20),
    "attention-only": lambda: Transformer(VOCAB, D, 2, 2, positions="none", channel=None, tied=False),
    "windowed": lambda: Transformer(VOCAB, D, 3, 2, window=3, qk_norm=True),
    "windowed-learned": lambda: Transformer(VOCAB, D, 2, 2, positions="learned", max_len=20, window=2),
    "mixed": lambda: SequenceModel(VOCAB, D, [Block(LSTM(D), MLP(D)), Block(Attention(D, 2, window=4), SwiGLU(D), "rms", dropout=.2)]),
    "linear": lambda: SequenceModel(VOCAB, D, [Block(LinearAttention(D, 2, "taylor2"), MLP(D)), Block(DeltaRule(D, 2)), Block(GatedLinearAttention(D, 2), SwiGLU(D))]),
    "all-attention": lambda: AllAttention(VOCAB, D, 2, 2, 6),
    "all-attention-mlp": lambda: AllAttention(VOCAB, D, 2, 2, 6, d_ff=10),
    **{f"recurrent-{name}": (lambda name=name: Recurrent(name, VOCAB, D, n_layers=2, d_hidden=6, channel="mlp", dropout=.1)) for name in CELLS},
}
every_mixer = pytest.mark.parametrize("name", MIXERS)
every_model = pytest.mark.parametrize("name", MODELS)
devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def mixer(name, dtype=torch.float64):
    torch.manual_seed(0)
    return MIXERS[name]().to(dtype).eval()


def model(name, dtype=torch.float64):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


def inputs(b=3, t=T, dtype=torch.float64, seed=1):
    return torch.randn(b, t, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def text(b=3, t=T, seed=1):
    return torch.randint(VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


def pieces(f, x, sizes, state=None):
    out = []
    for piece in x.split(list(sizes), 1):
        y, state = f(piece, state)
        out.append(y)
    return torch.cat(out, 1), state


def assert_close(a, b, tol=1e-10):
    "Equal to tol relative to the larger of 1 and the reference's largest magnitude."
    assert a.shape == b.shape and a.dtype == b.dtype
    scale = max(1., b.abs().max().item()) if b.numel() else 1.
    assert not b.numel() or (a-b).abs().max().item() <= tol*scale


def assert_same_state(a, b, tol=1e-10):
    assert len(leaves(a)) == len(leaves(b))
    for u,v in zip(leaves(a), leaves(b)): assert_close(u, v, tol)


splits = st.lists(st.integers(1, 5), min_size=1, max_size=T).map(lambda s: fit(s, T))


def fit(sizes, total):
    "Sizes cut or filled up so that they sum to total."
    out = []
    for s in sizes:
        if sum(out)+s >= total: break
        out.append(s)
    return [*out, total-sum(out)]


any_split = settings(max_examples=500 if LONG else 12, deadline=None, derandomize=not LONG)


# -- mixers and cells

@every_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mixer_keeps_shape_and_dtype(name, dtype):
    y, state = mixer(name, dtype)(inputs(dtype=dtype))
    assert y.shape == (3, T, D) and y.dtype == dtype and y.isfinite().all()
    assert all(len(s) == 3 for s in leaves(state))
    if dtype != torch.float64:
        assert_close(y.double(), mixer(name)(inputs(dtype=dtype).double())[0], 1e-5 if dtype == torch.float32 else .1)


@every_mixer
def test_mixer_is_causal_exactly(name):
    f, x = mixer(name), inputs().requires_grad_()
    y = f(x)[0]
    for i in (0, 4, T-2):
        g, = torch.autograd.grad(y[:,i].sum(), x, retain_graph=True)
        assert g[:,i+1:].count_nonzero() == 0
        assert g[:,i].count_nonzero() > 0


@every_mixer
def test_mixer_keeps_rows_apart(name):
    f, x = mixer(name), inputs().requires_grad_()
    y, state = f(x)
    g, = torch.autograd.grad(y[1].sum() + sum(s[1].abs().sum() for s in leaves(state) if s.requires_grad), x)
    assert g[0].count_nonzero() == g[2].count_nonzero() == 0 and g[1].count_nonzero() > 0
    for i in range(3): assert_close(f(x[i:i+1])[0], y[i:i+1])


@every_mixer
@any_split
@given(sizes=splits)
def test_mixer_in_any_split_is_one_pass(name, sizes):
    f, x = mixer(name), inputs()
    (whole, end), (parts, last) = f(x), pieces(f, x, sizes)
    assert_close(parts, whole)
    assert_same_state(last, end)


@every_mixer
def test_mixer_state(name):
    f, x = mixer(name), inputs().requires_grad_()
    empty = f.init_state(3)
    assert_close(f(x, empty)[0], f(x)[0])
    _, state = f(x)
    assert not is_store(state)
    cut = detach(state)
    assert not any(s.requires_grad for s in leaves(cut)) and all(torch.equal(a, b) for a,b in zip(leaves(cut), leaves(state)))
    assert nbytes(state) == sum(s.untyped_storage().nbytes() for s in leaves(state)) # nothing larger is kept alive
    rows, more = torch.tensor([2,0,2,1]), inputs(t=5, seed=2)
    assert_close(f(more[rows], select(state, rows))[0], f(more, state)[0][rows])


@every_mixer
@settings(max_examples=6 if LONG else 2, deadline=None, derandomize=True)
@given(b=st.integers(1, 3), t=st.integers(1, 6), before=st.integers(1, 5))
def test_mixer_gradcheck(name, b, t, before):
    f, x = mixer(name), inputs(b, t).requires_grad_()
    _, before = f(inputs(b, before, seed=3))
    parameters = dict(f.named_parameters())
    def call(x, *values):
        y, state = torch.func.functional_call(f, dict(zip(parameters, values)), (x, detach(before)))
        return y, *(s for s in leaves(state) if s.is_floating_point() or s.is_complex())
    assert torch.autograd.gradcheck(call, (x, *(p.detach().clone().requires_grad_() for p in parameters.values())))


@every_mixer
def test_mixer_runs_where_its_weights_are(name):
    "On the meta device any tensor made on a fixed device is a mismatch."
    f = mixer(name, torch.float32).to("meta")
    y, state = pieces(f, inputs(dtype=torch.float32).to("meta"), [5, 1, 6])
    assert y.is_meta and all(s.is_meta for s in leaves(state)) and all(s.is_meta for s in leaves(f.init_state(2)))


# -- models

@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", devices)
def test_model_keeps_shape_and_dtype(name, dtype, device):
    m = model(name, dtype).to(device)
    logits, state = pieces(m, text().to(device), [5, 1, 6])
    assert logits.shape == (3, T, VOCAB) and logits.dtype == dtype and logits.isfinite().all()
    assert logits.device.type == device and all(s.device.type == device for s in leaves(state))


@every_model
def test_model_has_the_face(name):
    m = model(name)
    assert m.vocab == VOCAB and m.embed.weight.shape == (VOCAB, m.d_model) and m.segment is None
    x, state = m.hidden(text())
    assert x.shape == (3, T, m.d_model)
    assert torch.equal(m.head(m.norm(x)), m(text())[0])
    seen = []
    hooks = [b.register_forward_hook(lambda block, args, out: seen.append(out[0])) for b in m.blocks]
    m(text())
    for h in hooks: h.remove()
    assert len(seen) == len(m.blocks) and torch.equal(seen[-1], x) # a hook on the last block sees what `hidden` returns


@every_model
def test_model_is_causal_exactly(name):
    m, kept = model(name), []
    hook = m.embed.register_forward_hook(lambda mod, args, out: kept.append(out))
    logits = m(text())[0]
    hook.remove()
    for i in (0, 5, T-2):
        g, = torch.autograd.grad(logits[:,i].sum(), kept[0], retain_graph=True)
        assert g[:,i+1:].count_nonzero() == 0 and g[:,i].count_nonzero() > 0
    changed = text()
    changed[:,7:] = (changed[:,7:]+1) % VOCAB
    assert_close(m(changed)[0][:,:7], logits[:,:7], 1e-12)


@every_model
@any_split
@given(sizes=splits)
def test_model_in_any_split_is_one_pass(name, sizes):
    m, tokens = model(name), text()
    with torch.no_grad(): (whole, end), (parts, last) = m(tokens), pieces(m, tokens, sizes)
    assert_close(parts, whole)
    assert_same_state(last, end)


@every_model
def test_model_state(name):
    m, tokens = model(name), text()
    assert_close(m(tokens, m.init_state(3))[0], m(tokens)[0])
    state = detach(m(tokens)[1])
    assert not any(s.requires_grad for s in leaves(state)) and nbytes(state) > 0
    rows, more = torch.tensor([1,1,0]), text(t=4, seed=5)
    assert_close(m(more[rows], select(state, rows))[0], m(more, state)[0][rows])
    assert_close(m(tokens[:1])[0], m(tokens)[0][:1])


@every_model
def test_state_survives_a_safe_checkpoint(name, tmp_path):
    m, tokens = model(name), text()
    state = detach(m(tokens)[1])
    torch.save(state, tmp_path/"state.pt")
    back = torch.load(tmp_path/"state.pt", weights_only=True)
    more = text(t=3, seed=4)
    assert torch.equal(m(more, back)[0], m(more, state)[0])
    twin = MODELS[name]().double().eval()
    twin.load_state_dict(m.state_dict())
    assert torch.equal(twin(tokens)[0], m(tokens)[0]) and torch.equal(copy.deepcopy(m)(tokens)[0], m(tokens)[0])


@every_model
def test_model_repeats_itself(name):
    m, tokens = model(name), text()
    assert torch.equal(m(tokens)[0], m(tokens)[0])
    assert all(torch.equal(a, b) for a,b in zip(model(name).parameters(), m.parameters())) # same seed, same start
    m.train()
    def trained(seed):
        torch.manual_seed(seed)
        return m(tokens)[0]
    assert torch.equal(trained(3), trained(3))
    has_dropout = any(isinstance(mod, torch.nn.Dropout) and mod.p > 0 for mod in m.modules())
    assert torch.equal(trained(3), trained(4)) != has_dropout


@every_model
def test_every_parameter_gets_a_gradient(name):
    m = model(name).train()
    m(text())[0].logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert all(p.grad.count_nonzero() > 0 for p in m.parameters() if p.dim() > 1)


@every_model
def test_model_runs_where_its_weights_are(name):
    logits, state = pieces(model(name, torch.float32).to("meta"), text().to("meta"), [5, 1, 6])
    assert logits.is_meta and all(s.is_meta for s in leaves(state))


@every_model
def test_model_says_what_is_wrong(name):
    m = model(name)
    with pytest.raises(TypeError, match="tokens: expected an int64 or int32 tensor; got torch.float32"): m(text().float())
    with pytest.raises(TypeError, match="tokens: .* got list"): m([[1, 2]])
    with pytest.raises(ValueError, match=r"neither empty; got \(3, 0\)"): m(text()[:,:0])
    with pytest.raises(ValueError, match=r"expected shape \(batch, time\)"): m(text()[0])
    with pytest.raises(ValueError, match=f"expected 0 to {VOCAB-1} .* got .* to {VOCAB}"): m(text()*0 + VOCAB)
    with pytest.raises(ValueError, match="got -1 to -1"): m(text()*0 - 1)
    with pytest.raises(ValueError, match="expected batch 3, that of the state"): m(text(2), m(text())[1])
    if m.max_len is not None:
        with pytest.raises(ValueError, match="length 21 is over the limit max_len=20"): m(text(t=21))
        with pytest.raises(ValueError, match="length 24 is over the limit max_len=20"): m(text(), m(text())[1])


@every_model
def test_generating_through_the_state_is_reading_again(name):
    m, tokens = model(name), text(2, 4)
    added = generate(m, tokens, 6, temperature=0)
    for _ in range(6): tokens = torch.cat([tokens, m(tokens)[0][:,-1:].argmax(-1)], 1)
    assert torch.equal(added, tokens[:,4:])
    sample = lambda seed: generate(m, tokens, 5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(sample(1), sample(1)) and generate(m, tokens, 0).shape == (2, 0)


def test_generate_restores_the_mode_and_refuses_cold_below_zero():
    m = model("gpt2-like").train()
    generate(m, text(), 2)
    assert m.training
    with pytest.raises(ValueError, match="temperature: expected 0 or more; got -1"): generate(m, text(), 2, temperature=-1)


# -- what a state is

class Store:
    is_store = True
    def __init__(self, rows=4): self.rows, self.nbytes = rows, 100
    def detach(self): return self
    def select(self, rows): return Store(len(rows))


def test_a_store_answers_for_itself():
    store = Store()
    assert is_store(store) and detach(store) is store and nbytes(store) == 100 and leaves(store) == []
    assert select(store, torch.tensor([0])).rows == 1


def test_values_nest():
    state = (None, [torch.ones(2, 3)], dict(a=torch.zeros(2, dtype=torch.long)))
    assert nbytes(state) == 6*4 + 2*8 and select(state, torch.tensor([1]))[1][0].shape == (1, 3)
    assert detach(None) is None and nbytes(None) == 0
    with pytest.raises(TypeError, match="state: expected None, tensors"): nbytes(3)


# -- the Transformer

def test_a_window_caches_one_less_than_itself_and_a_cell_does_not_grow():
    size = lambda m, t: nbytes(m(text(t=t))[1])
    grows, window, cell = Transformer(VOCAB, D, 2, 2), Transformer(VOCAB, D, 2, 2, window=4), Recurrent("lstm", VOCAB, D)
    assert size(grows, 20) - size(grows, 10) == 10*(2*2*3*D*4)
    assert size(window, 20) == size(window, 10) == 2*(2*3*D*3*4 + 3*8)
    assert size(cell, 20) == size(cell, 1) == 2*3*D*4


def test_attention_is_permutation_blind_without_positions_only():
    x = inputs(1, 6)
    order = torch.tensor([3,1,0,4,2,5])
    for positions,blind in (("none", True), ("rope", False)):
        torch.manual_seed(0)
        f = Attention(D, 2, positions=positions).double()
        assert torch.allclose(f(x)[0][:,-1], f(x[:,order])[0][:,-1], atol=1e-12) == blind


def test_dropout_is_on_the_branches_only():
    torch.manual_seed(0)
    block, x = Block(Attention(D, 2), MLP(D), dropout=1.).double().train(), inputs()
    assert torch.equal(block(x)[0], x)


def test_initial_weights_are_those_documented():
    torch.manual_seed(0)
    m = Transformer(500, 128, 8, 4, channel="swiglu", tied=False, bias=True)
    std = lambda w: w.std().item()/.02
    assert abs(std(m.embed.weight)-1) < .02 and abs(std(m.head.weight)-1) < .02
    for b in m.blocks:
        assert abs(std(b.mixer.query.weight)-1) < .05 and abs(std(b.mixer.output.weight)*4-1) < .05 # 1/√(2·8) = 1/4
        assert abs(std(b.channel.up.weight)-1) < .05 and abs(std(b.channel.down.weight)*4-1) < .05
        assert b.mixer.query.bias.count_nonzero() == 0
    assert Transformer(5, 8).head.weight is not None and (t := Transformer(5, 8)).head.weight is t.embed.weight


@pytest.mark.parametrize("kwargs, message", [
    (dict(n_heads=3), "n_heads: expected a divisor of d_model=8; got 3"),
    (dict(n_heads=4, n_kv_heads=3), "n_kv_heads: expected a divisor of n_heads=4; got 3"),
    (dict(n_heads=8), "rope needs an even head width; got 1"),
    (dict(window=0), "window: expected at least 1"),
    (dict(positions="sine"), "positions: expected one of 'rope', 'learned', 'none'; got 'sine'"),
    (dict(positions="learned"), "max_len: learned positions need it"),
    (dict(norm="batch"), "norm: expected one of 'layer', 'rms'; got 'batch'"),
    (dict(channel="conv"), "channel: expected one of 'mlp', 'swiglu', None; got 'conv'"),
])
def test_transformer_says_what_is_wrong(kwargs, message):
    with pytest.raises(ValueError, match=message): Transformer(VOCAB, D, **kwargs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_range_checks_step_aside_under_transforms():
    m, tokens = model("llama-like"), text()
    assert_close(torch.func.vmap(lambda row: m(row[None])[0][0])(tokens), m(tokens)[0])
    whole = torch.compile(m, backend="eager", fullgraph=True)
    assert_close(pieces(whole, tokens, [5, 7])[0], m(tokens)[0])


# -- independent derivations

def copied(ours, theirs, names):
    "Our model with another's weights; names maps our parameter names to (their name, transpose)."
    weights = theirs.state_dict()
    ours.load_state_dict({o: (weights[t].T if flip else weights[t]) for o,(t,flip) in names.items()})
    return ours


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-5)]) # theirs computes its angles in float32
def test_llama_of_transformers_gives_the_same_logits(dtype, tol):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True, max_position_embeddings=64, initializer_range=.3)
    theirs = transformers.LlamaForCausalLM(config).to(dtype).eval()
    names = {"embed.weight": ("model.embed_tokens.weight", False), "head.weight": ("lm_head.weight", False), "norm.weight": ("model.norm.weight", False)}
    for i in range(2):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        names |= {a+f"mixer.{o}.weight": (b+f"self_attn.{t}_proj.weight", False) for o,t in zip(("query","key","value","output"), "qkvo")}
        names |= {a+f"channel.{o}.weight": (b+f"mlp.{o}_proj.weight", False) for o in ("gate","up","down")}
        names |= {a+"norm1.weight": (b+"input_layernorm.weight", False), a+"norm2.weight": (b+"post_attention_layernorm.weight", False)}
    ours = copied(Transformer(VOCAB, 36, 2, 9, 3, 40, norm="rms", channel="swiglu", rope_base=1e5).to(dtype), theirs, names)
    tokens = text(t=50)
    with torch.no_grad(): reference = theirs(tokens).logits; assert_close(ours(tokens)[0], reference, tol)
    with torch.no_grad(): assert_close(pieces(ours, tokens, [20, 1, 29])[0], reference, tol)


def test_gpt2_of_transformers_gives_the_same_logits():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=24, n_layer=2, n_head=3, initializer_range=.3)).double().eval()
    for name,p in theirs.named_parameters():
        if name.endswith("bias"): torch.nn.init.normal_(p, std=.3)
    weights = theirs.state_dict()
    for i in range(2):
        for kind in ("weight", "bias"):
            for o,piece in zip("qkv", weights[f"transformer.h.{i}.attn.c_attn.{kind}"].chunk(3, -1)): weights[f"{o}{i}.{kind}"] = piece
    theirs.state_dict = lambda: weights
    names = {"embed.weight": ("transformer.wte.weight", False), "head.weight": ("lm_head.weight", False), "positions.weight": ("transformer.wpe.weight", False)}
    names |= {f"norm.{k}": (f"transformer.ln_f.{k}", False) for k in ("weight", "bias")}
    for i in range(2):
        for k in ("weight", "bias"):
            a, b, flip = f"blocks.{i}.", f"transformer.h.{i}.", k == "weight"
            names |= {a+f"mixer.{o}.{k}": (f"{t}{i}.{k}", flip) for o,t in zip(("query","key","value"), "qkv")}
            names |= {a+f"mixer.output.{k}": (b+f"attn.c_proj.{k}", flip), a+f"channel.up.{k}": (b+f"mlp.c_fc.{k}", flip), a+f"channel.down.{k}": (b+f"mlp.c_proj.{k}", flip)}
            names |= {a+f"norm{n}.{k}": (b+f"ln_{n}.{k}", False) for n in (1, 2)}
    ours = copied(Transformer(VOCAB, 24, 2, 3, positions="learned", max_len=64, bias=True).double(), theirs, names)
    tokens = text(t=40)
    with torch.no_grad(): assert_close(ours(tokens)[0], theirs(tokens).logits, 1e-12)
