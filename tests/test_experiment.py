"lab.experiment: bytes that repeat, walls that hold, twins that must fail, errors that name what is wrong."
import hashlib, json, os, re, subprocess, sys
import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch

from memnotes.lab.experiment import (CARD, CONTROLS, INK, STYLES, CheckFailed, Experiment, TwinPassed, color, contrast, csv_bytes, mean_interval, seed_everything, style, uneven)

ALT = "A line that rises from zero to two, in steps of one."
CLAIMS = """
chapters:
  inside/20_lens: {asks: "What does a layer say?"}
  inside/21_other: {asks: "And another?"}
checks:
  lens_exact: {chapter: inside/20_lens, role: wall, relation: "<=", bound: 1e-5, says: two derivations agree}
  lens_says: {chapter: inside/20_lens, role: claim, relation: ">", bound: 0.5, says: the word is first}
  lens_large: {chapter: inside/20_lens, role: limit, relation: ">", bound: 0.5, says: at size too, profiles: [full]}
claims:
  - {id: 6, statement: A layer says it., sources: [a2020], chapter: inside/20_lens, checks: [lens_says]}
"""

@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path/"data").mkdir()
    (tmp_path/"data"/"claims.yaml").write_text(CLAIMS)
    (tmp_path/"data"/"references.bib").write_text("@misc{a2020,\n}\n")
    monkeypatch.setenv("MEMNOTES_ROOT", str(tmp_path))
    monkeypatch.delenv("MEMNOTES_OUT", raising=False)
    yield tmp_path
    plt.close("all")

@pytest.fixture
def exp(root): return Experiment("inside/20_lens")

@pytest.fixture
def staged(root, monkeypatch):
    monkeypatch.setenv("MEMNOTES_OUT", str(root/"stage"))
    return Experiment("inside/20_lens")

def line(n=3):
    fig, ax = plt.subplots()
    ax.plot(np.arange(n), np.random.default_rng(0).normal(size=n).cumsum(), **style("LSTM"))
    ax.set(title="It rises", xlabel="step", ylabel="sum (nats)")
    return fig

def saved(exp): return json.loads((exp.out/"experiment.json").read_text())

# ---- construction ----
def test_a_wrong_name_is_met_with_the_nearest(root):
    with pytest.raises(ValueError, match="profile.*'fulll'.*did you mean 'full'"): Experiment("inside/20_lens", "fulll")
    with pytest.raises(ValueError, match="chapter.*did you mean 'inside/20_lens'"): Experiment("inside/20_lense")
    with pytest.raises(ValueError, match="seed"): Experiment("inside/20_lens", seed=-1)

def test_a_notebook_is_a_chapter_even_if_unlisted(root):
    (root/"nbs"/"core").mkdir(parents=True)
    (root/"nbs"/"core"/"09_new.ipynb").write_text("{}")
    assert Experiment("core/09_new").declared == {}

def test_outputs_go_to_the_runner_or_to_runs(exp, staged, root):
    assert exp.out == root/"runs"/"interactive"/"smoke"/"inside"/"20_lens" and staged.out == root/"stage"

def test_seed_everything():
    def draw(): return seed_everything(5), np.random.rand(), torch.rand(3).tolist(), __import__("random").random()
    assert draw() == draw()
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    for bad in (-1, 1.5, True, "0"):
        with pytest.raises(ValueError, match="seed"): seed_everything(bad)

# ---- sizes, seeds, tuning ----
def test_pick_takes_all_three_sizes(exp):
    assert exp.pick(smoke=1, quick=2, full=3) == 1
    with pytest.raises(TypeError, match="full"): exp.pick(smoke=1, quick=2)

@pytest.mark.parametrize("seed", [0, 1, 7])
def test_reporting_and_tuning_seeds_never_meet(root, seed):
    exp = Experiment("inside/20_lens", seed=seed)
    assert not set(exp.seeds(1000)) & set(exp.tuning_seeds(1000))
    assert exp.seeds(3) == exp.seeds(5)[:3] and len(set(exp.seeds(1000))) == 1000
    assert not set(saved(exp)["seeds"]["reporting"]) & set(saved(exp)["seeds"]["tuning"])

def test_a_statistic_needs_five_seeds_from_quick_on(root):
    assert len(Experiment("inside/20_lens").seeds(1)) == 1
    for profile in ("quick", "full"):
        with pytest.raises(ValueError, match="at least 5"): Experiment("inside/20_lens", profile).seeds(4)

def test_unequal_tuning_is_refused(exp):
    exp.check("lens_exact", 0.), exp.twin("lens_exact", 1.), exp.check("lens_says", 1), exp.twin("lens_says", 0)
    exp.tried("LSTM", [1e-3, torch.tensor(3e-3)]), exp.tried("GRU", [1e-3, np.float32(3e-3)])
    exp.tried("far/LSTM", [1])
    exp.verdicts()
    exp.tried("GRU", [1e-3])
    with pytest.raises(ValueError, match="arms differ in candidates"): exp.verdicts()
    assert uneven({"a": [1], "b": [1, 2]}) == {"": {"a": 1, "b": 2}}

# ---- checks ----
@pytest.mark.parametrize("value", [1e-6, 0, False, np.float64(1e-6), np.zeros((1, 1)), torch.tensor(1e-6), torch.tensor([0]), np.bool_(False)])
def test_a_value_is_one_number(exp, value):
    assert exp.check("lens_exact", value) is True and isinstance(saved(exp)["checks"]["lens_exact"]["value"], float)

@pytest.mark.parametrize("value,error", [(float("nan"), ValueError), (float("inf"), ValueError), (torch.tensor(float("nan")), ValueError), ("1", TypeError), (None, TypeError),
                                         (torch.zeros(2), TypeError), (np.zeros(2), TypeError), (1j, TypeError)])
def test_what_is_not_a_number_is_refused(exp, value, error):
    with pytest.raises(error, match="lens_exact"): exp.check("lens_exact", value)
    assert "lens_exact" not in saved(exp)["checks"]

@pytest.mark.parametrize("profile", ["smoke", "quick", "full"])
def test_a_wall_stops_the_chapter(root, profile):
    exp = Experiment("inside/20_lens", profile)
    with pytest.raises(CheckFailed, match=r"'lens_exact': 0.1 <= 1e-05.*two derivations agree"): exp.check("lens_exact", .1)
    with pytest.raises(CheckFailed): exp.check("lens_exact", 1e-5, (0, 2e-5))
    assert exp.check("lens_says", .1) is False
    assert exp.check("lens_says", .6, (.4, .8)) is None

def test_a_check_is_declared_first(exp):
    with pytest.raises(ValueError, match="did you mean 'lens_exact'"): exp.check("lens_exakt", 0)
    with pytest.raises(ValueError, match="declared for full"): exp.check("lens_large", 1)
    for bad in ((1, 0), (0, 1, 2), (0, float("nan"))):
        with pytest.raises(ValueError, match="lens_says"): exp.check("lens_says", .5, bad)

def test_a_twin_must_fail(exp):
    with pytest.raises(TwinPassed, match="would not notice"): exp.twin("lens_exact", 1e-6)
    with pytest.raises(TwinPassed, match="undecided"): exp.twin("lens_says", .5, (.2, .8))
    assert exp.twin("lens_exact", .3) == .3 and saved(exp)["checks"]["lens_exact"] == {"twin": .3}
    exp.check("lens_exact", 0)
    assert saved(exp)["checks"]["lens_exact"]["twin"] == .3

def test_mean_interval_is_students():
    from scipy import stats
    x = np.random.default_rng(1).normal(size=7)
    mean, ends = mean_interval(torch.tensor(x))
    assert np.allclose((mean, *ends), (x.mean(), *stats.t.interval(.95, 6, x.mean(), stats.sem(x))), atol=1e-12)
    with pytest.raises(ValueError, match="at least 2"): mean_interval([1.])

# ---- verdicts ----
def test_smoke_wants_every_check_and_every_twin(exp):
    with pytest.raises(ValueError, match=r"value \['lens_exact', 'lens_says'\]"): exp.verdicts()
    exp.check("lens_exact", 0), exp.twin("lens_exact", 1), exp.check("lens_says", .9)
    with pytest.raises(ValueError, match=r"twin \['lens_says'\]"): exp.verdicts()
    exp.twin("lens_says", .1)
    assert exp.verdicts().loc["6", "verdict"] == "not judged at smoke"

@pytest.mark.parametrize("value,ends,word", [(.9, None, "holds"), (.1, None, "does not hold"), (.6, (.4, .8), "open")])
def test_quick_says_what_the_numbers_say(root, value, ends, word):
    exp = Experiment("inside/20_lens", "quick")
    exp.check("lens_exact", 0), exp.check("lens_says", value, ends)
    assert exp.verdicts().loc["6", "verdict"] == word

# ---- figures ----
def test_a_figure_is_three_files(exp):
    shown = exp.figure("rise", line(), data=pd.DataFrame({"x": [1, 2], "y": [.1, 1/3]}), alt=ALT)
    assert sorted(p.name for p in exp.out.iterdir()) == ["experiment.json", "rise.csv", "rise.png", "rise.svg"]
    assert (exp.out/"rise.csv").read_bytes() == b"x,y\n1,0.1\n2,0.333333333\n"
    assert saved(exp)["figures"]["rise"] == {"alt": ALT, "title": "It rises", "measured": False}
    assert repr(shown) == ALT and f'alt="{ALT}"' in shown._repr_html_() and not plt.get_fignums()

def test_the_svg_speaks(exp):
    alt = 'Loss < 2 & "falling", from left to right.'
    exp.figure("a_b", line(), data={"x": [1]}, alt=alt, title="A <finding>")
    svg = ET.fromstring((exp.out/"a_b.svg").read_bytes())
    ns = "{http://www.w3.org/2000/svg}"
    assert svg.get("role") == "img" and svg.get("aria-labelledby") == "a_b-title a_b-desc"
    assert svg.find(ns+"title").text == "A <finding>" and svg.find(ns+"desc").text == alt

def test_the_card_is_opaque_and_its_ink_legible(exp):
    exp.figure("rise", line(), data={"x": [1]}, alt=ALT)
    pixels = plt.imread(exp.out/"rise.png")
    assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1
    assert f"fill: {CARD}" in (exp.out/"rise.svg").read_text()
    assert contrast(INK) > 12 and min(contrast(s["color"]) for s in STYLES.values()) >= 3
    assert contrast("#ffffff", "#000000") == pytest.approx(21)

def test_nothing_half_written(exp, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): exp.figure("rise", line(), data={"x": [1]}, alt=ALT)
    assert [p.name for p in exp.out.iterdir()] == ["experiment.json"]

def test_what_is_too_large_is_refused_with_a_remedy(exp):
    with pytest.raises(ValueError, match="csv has .*aggregate"): exp.figure("rise", line(), data={"x": np.random.rand(40_000)}, alt=ALT)
    fig, ax = plt.subplots()
    ax.pcolormesh(np.random.default_rng(0).normal(size=(60, 60)))
    with pytest.raises(ValueError, match="svg has .*rasterized=True"): exp.figure("map", fig, data={"x": [1]}, alt=ALT)
    assert [p.name for p in exp.out.iterdir()] == ["experiment.json"]
    fig, ax = plt.subplots()
    ax.pcolormesh(np.random.default_rng(0).normal(size=(60, 60)), rasterized=True)
    exp.figure("map", fig, data={"x": [1]}, alt=ALT)

@pytest.mark.parametrize("given,message", [(dict(slug="Rise"), "slug"), (dict(slug="../x"), "slug"), (dict(slug=""), "slug"), (dict(alt="a line"), "20 characters"), (dict(alt=" "*30), "20 characters"),
                                           (dict(alt=None), "20 characters"), (dict(data=[]), "empty")])
def test_bad_figures_are_refused(exp, given, message):
    with pytest.raises(ValueError, match=message): exp.figure(**{**dict(slug="rise", fig=line(), data={"x": [1]}, alt=ALT), **given})

def test_an_empty_figure_is_refused(exp):
    plt.close("all")
    with pytest.raises(ValueError, match="nothing drawn"): exp.figure("rise", data={"x": [1]}, alt=ALT)

def test_axes_and_the_current_figure_will_do(exp):
    exp.figure("one", line().axes[0], data={"x": [1]}, alt=ALT)
    line()
    exp.figure("two", data={"x": [1]}, alt=ALT)
    assert (exp.out/"one.svg").read_text().replace("one-", "") == (exp.out/"two.svg").read_text().replace("two-", "")

def test_the_runner_refuses_what_is_recorded_twice(exp, staged):
    for e in (exp, staged): e.figure("rise", line(), data={"x": [1]}, alt=ALT), e.check("lens_exact", 0), e.tried("LSTM", [1])
    exp.figure("rise", line(), data={"x": [1]}, alt=ALT), exp.check("lens_exact", 0), exp.tried("LSTM", [1])
    with pytest.raises(ValueError, match="twice"): staged.figure("rise", line(), data={"x": [1]}, alt=ALT)
    with pytest.raises(ValueError, match="twice"): staged.check("lens_exact", 0)
    with pytest.raises(ValueError, match="twice"): staged.tried("LSTM", [1])

def test_csv_keeps_a_named_index_and_every_float32():
    assert csv_bytes(pd.Series([1.5], index=pd.Index([3], name="layer"), name="kl")) == b"layer,kl\n3,1.5\n"
    x = np.random.default_rng(0).normal(size=5000).astype("float32")
    back = np.array([float(v) for v in csv_bytes({"x": x}).decode().split()[1:]], dtype="float32")
    assert (x == back).all()

DRAW = """
import pandas as pd, numpy as np, seaborn as sns, torch
from memnotes.lab.experiment import *
exp = Experiment("inside/20_lens")
x = pd.DataFrame({"x": np.tile(np.arange(20), 3), "y": torch.randn(60).numpy(), "who": np.repeat(["LSTM", "GRU", "control"], 20)})
ax = sns.lineplot(x, x="x", y="y", hue="who", palette=exp.palette)
ax.imshow(torch.randn(8, 8), extent=(0, 20, -2, 2), aspect="auto", alpha=.3)
exp.figure("drawn", ax, data=x, alt="Three lines over a square of noise, for the bytes.", measured=False)
"""

def test_two_processes_leave_the_same_bytes(root):
    def run(hashseed):
        env = {**os.environ, "PYTHONHASHSEED": hashseed, "MEMNOTES_OUT": str(root/hashseed), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        subprocess.run([sys.executable, "-c", DRAW], check=True, env=env, cwd=root)
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (root/hashseed).iterdir()}
    one, two = run("1"), run("2")
    assert set(one) == {"drawn.svg", "drawn.png", "drawn.csv", "experiment.json"} and one == two
    assert not re.search(rb"\d{4}-\d\d-\d\d|[Mm]atplotlib v", (root/"1"/"drawn.svg").read_bytes())

# ---- colours ----
def test_a_name_has_one_look_and_a_family_no_two_alike():
    with pytest.raises(ValueError, match="did you mean 'minGRU'"): color("mingru")
    from memnotes.lab.experiment import _FAMILIES
    for names in _FAMILIES.values():
        each = names.split("|")
        looks = [tuple(style(n).items()) for n in each]
        assert len(set(looks)) == len(looks)
        assert len({(s["color"], s["linestyle"]) for s in map(style, each)}) == len(each)
    assert {color(c) for c in CONTROLS} == {color("control")}
