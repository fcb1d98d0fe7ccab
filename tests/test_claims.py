"lab.claims: the rule by brute force, the register without a loose end, the ledger under staleness and disagreement."
import itertools, json, math, re
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st

from memnotes.lab.claims import (RELATIONS, VERDICTS, bibkeys, chapters_table, checks_table, claims_table, explain, ledger, load_claims, outcome, published, verdict, write_ledger)

root = Path(__file__).parent.parent
register = load_claims(root)

# ---- one check ----
numbers = st.integers(-4, 4).map(lambda n: n/2)

@given(relation=st.sampled_from(sorted(RELATIONS)), bound=numbers, a=numbers, b=numbers)
def test_an_interval_is_asked_at_every_point(relation, bound, a, b):
    low, high = sorted((a, b))
    every = {bool(RELATIONS[relation](x, bound)) for x in np.arange(low, high+.01, .25)}
    assert outcome(relation, bound, low, (low, high)) is (every.pop() if len(every) == 1 else None)

@given(relation=st.sampled_from(sorted(RELATIONS)), bound=numbers, value=numbers)
def test_a_value_alone_always_decides(relation, bound, value):
    assert outcome(relation, bound, value) is outcome(relation, bound, value, (value, value)) is RELATIONS[relation](value, bound)

# ---- one verdict ----
def by_hand(claims, limits):
    "DESIGN's rule, said differently: count."
    each = claims + limits
    if "absent" in each or None in each or not claims: return "open"
    good = sum(claims)
    if good == 0: return "does not hold"
    return "holds" if good == len(claims) and all(limits) else "holds within limits"

@pytest.mark.parametrize("n_claims,n_limits", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (3, 0), (2, 2)])
def test_the_rule_by_brute_force(n_claims, n_limits):
    names = [f"c{i}" for i in range(n_claims)] + [f"l{i}" for i in range(n_limits)]
    for said in itertools.product([True, False, None, "absent"], repeat=len(names)):
        results = {n: {"role": "claim" if n[0] == "c" else "limit", "passed": p} for n,p in zip(names, said) if p != "absent"}
        word, why = explain({"checks": names}, results)
        assert word == by_hand(list(said[:n_claims]), list(said[n_claims:])) and word in VERDICTS and why
        broken = results | {"wall": {"role": "wall", "passed": False}}
        assert verdict({"checks": names}, broken) == "open"

# ---- the register's errors ----
GOOD = dict(chapters={"inside/20_lens": {"asks": "What?"}, "memory/56_far": {"asks": "How far?"}},
    checks={"lens_exact": dict(chapter="inside/20_lens", role="wall", relation="<=", bound=1e-5, says="equal"), "lens_says": dict(chapter="inside/20_lens", role="claim", relation=">", bound=.5, says="first"),
            "lens_early": dict(chapter="inside/20_lens", role="limit", relation=">", bound=.5, says="early"), "far_says": dict(chapter="memory/56_far", role="claim", relation=">", bound=.5, says="far")},
    claims=[dict(id="6", statement="It says.", sources=["a2020"], chapter="inside/20_lens", checks=["lens_says", "lens_early"]),
            dict(id="17", statement="It goes far.", sources=["a2020"], chapter="inside/20_lens", also=["memory/56_far"], checks=["lens_says", "far_says"]),
            dict(id="9", statement="Nobody looked.", sources=["a2020"], chapter="memory/56_far", checks=[])], amendments=[])

def tree(tmp_path, change=None):
    told = json.loads(json.dumps(GOOD))
    if change: change(told)
    (tmp_path/"data").mkdir(exist_ok=True)
    (tmp_path/"data"/"claims.yaml").write_text(json.dumps(told))
    (tmp_path/"data"/"references.bib").write_text("@misc{a2020,\n}\n@article{ zebra ,\n}\n")
    return tmp_path

def test_keys_of_a_bibliography(tmp_path): assert bibkeys(tree(tmp_path)) == {"a2020", "zebra"}

@pytest.mark.parametrize("change,message", [
    (lambda t: t["checks"]["lens_says"].update(role="clam"), "check lens_says: role 'clam'; did you mean 'claim'"),
    (lambda t: t["checks"]["lens_says"].update(relation="=>"), "check lens_says: relation '=>'; expected one of"),
    (lambda t: t["checks"]["lens_says"].update(bound="small"), "check lens_says: bound 'small'; expected a number"),
    (lambda t: t["checks"]["lens_says"].pop("bound"), "check lens_says: has no bound"),
    (lambda t: t["checks"]["lens_says"].update(chapter="inside/20_lenz"), "check lens_says: chapter 'inside/20_lenz'; did you mean 'inside/20_lens'"),
    (lambda t: t["checks"]["lens_says"].update(rols="x"), "check lens_says: unknown field 'rols'; did you mean 'role'"),
    (lambda t: t["checks"]["lens_says"].update(profiles=["ful"]), "check lens_says: profiles"),
    (lambda t: t["claims"][0].update(sources=["a2021"]), "claim 6: source 'a2021' is not in data/references.bib; did you mean 'a2020'"),
    (lambda t: t["claims"][0].update(sources=[]), "claim 6: names no source"),
    (lambda t: t["claims"][0].update(checks=["lens_say"]), "claim 6: check 'lens_say' is not declared; did you mean 'lens_says'"),
    (lambda t: t["claims"][0].update(checks=["far_says"]), "claim 6: check 'far_says' belongs to memory/56_far: name that chapter under `also`"),
    (lambda t: t["claims"][0].update(chapter="inside/2_lens"), "claim 6: chapter 'inside/2_lens'; did you mean"),
    (lambda t: t["claims"][1].update(id=6), "claim 6: id given twice"),
    (lambda t: t["claims"][0].pop("statement"), "claim 6: has no statement"),
    (lambda t: t["amendments"].append(dict(check="x", **{"from": 1, "to": 2}, reason="y")), "amendment: check 'x' is not declared"),
    (lambda t: t["amendments"].append(dict(check="lens_says", **{"from": 1, "to": 2})), "amendment 0: has no reason"),
    (lambda t: t.update(claim=[]), "unknown section 'claim'; did you mean 'claims'")])
def test_what_is_wrong_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)): load_claims(tree(tmp_path, change))

def test_all_problems_come_at_once(tmp_path):
    with pytest.raises(ValueError, match="2 problem"): load_claims(tree(tmp_path, lambda t: (t["checks"]["lens_says"].update(role="x"), t["claims"][2].update(sources=["z"]))))

def test_yaml_that_would_mislead(tmp_path):
    tree(tmp_path)
    (tmp_path/"data"/"claims.yaml").write_text("checks:\n  a: {}\n  a: {}\n")
    with pytest.raises(ValueError, match="key given twice: a"): load_claims(tmp_path)
    (tmp_path/"data"/"claims.yaml").write_text("chapters: {a/1_b: {asks: x}}\nchecks:\n  b_c: {chapter: a/1_b, role: wall, relation: '<', bound: 1e-5, says: x}\n")
    assert load_claims(tmp_path)["checks"]["b_c"]["bound"] == 1e-5
    (tmp_path/"data"/"claims.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="claims.yaml"): load_claims(tmp_path)

# ---- the ledger ----
def write(at, chapter="inside/20_lens", code="now"):
    book = at/"nbs"/f"{chapter}.ipynb"
    book.parent.mkdir(parents=True, exist_ok=True)
    book.write_text(code)

def run(at, profile, checks, chapter="inside/20_lens", code="now"):
    out = at/"figures"/profile/chapter
    out.mkdir(parents=True, exist_ok=True)
    checks = {n: {"value": v if not isinstance(v, tuple) else sum(v)/2, "interval": v if isinstance(v, tuple) else None} for n,v in checks.items()}
    (out/"run.json").write_text(json.dumps({"code_key": code, "checks": checks, "device": "toy", "measured": {"wall_s": 125.2}}))

key = lambda book: book.read_text()
def entry(at, i): return next(c for c in ledger(at, key)["claims"] if c["id"] == i)
def said(at, i="6"): return entry(at, i)["verdict"], entry(at, i)["profile"]

YES, NO = {"lens_exact": 0, "lens_says": .9, "lens_early": .9}, {"lens_exact": 0, "lens_says": .1, "lens_early": .1}

def test_without_a_run_all_is_open(tmp_path):
    book = ledger(tree(tmp_path), key)
    assert {c["verdict"] for c in book["claims"]} == {"open"} and book["summary"]["open"] == 3
    assert [c["state"] for c in book["chapters"].values()] == ["not written", "not written"]
    assert entry(tmp_path, "9")["why"] == "no check is declared yet" and entry(tmp_path, "6")["why"] == "not run yet"
    assert chapters_table(tmp_path, key).verdict.tolist() == ["not written", "not written"]

def test_the_largest_fresh_profile_decides(tmp_path):
    write(tree(tmp_path)); run(tmp_path, "quick", YES)
    assert said(tmp_path) == ("holds", "quick")
    run(tmp_path, "full", YES)
    assert said(tmp_path) == ("holds", "full")
    run(tmp_path, "smoke", NO)
    assert said(tmp_path) == ("holds", "full"), "smoke decides nothing"

def test_a_stale_larger_result_stays_in_sight_and_decides_nothing(tmp_path):
    write(tree(tmp_path)); run(tmp_path, "quick", YES); run(tmp_path, "full", NO, code="before")
    assert said(tmp_path) == ("holds", "quick")
    assert entry(tmp_path, "6")["stale"] == [{"chapter": "inside/20_lens", "profile": "full", "verdict": "does not hold", "why": "all fail: lens_says"}]
    write(tmp_path, code="later")
    assert said(tmp_path) == ("open", "") and entry(tmp_path, "6")["why"] == "no fresh run" and len(entry(tmp_path, "6")["stale"]) == 2
    (tmp_path/"nbs"/"inside"/"20_lens.ipynb").unlink()
    assert said(tmp_path)[0] == "open", "a chapter that is gone speaks for nothing"

def test_fresh_profiles_that_disagree_leave_it_open(tmp_path):
    write(tree(tmp_path)); run(tmp_path, "quick", YES); run(tmp_path, "full", NO)
    assert said(tmp_path) == ("open", "full")
    assert entry(tmp_path, "6")["why"] == "profiles disagree: quick holds, full does not hold"
    assert entry(tmp_path, "6")["by_profile"] == {"quick": "holds", "full": "does not hold"}
    run(tmp_path, "quick", YES | {"lens_says": (.4, .9)})
    assert said(tmp_path) == ("does not hold", "full"), "an open smaller run contradicts nothing"

def test_a_check_that_needs_a_larger_size_leaves_the_smaller_open(tmp_path):
    write(tree(tmp_path, lambda t: t["checks"]["lens_early"].update(profiles=["full"]))); run(tmp_path, "quick", {"lens_exact": 0, "lens_says": .9})
    assert said(tmp_path)[0] == "open" and "lens_early" in entry(tmp_path, "6")["why"]
    run(tmp_path, "full", YES)
    assert said(tmp_path) == ("holds", "full")

def test_a_claim_on_two_chapters_waits_for_both(tmp_path):
    write(tree(tmp_path)); run(tmp_path, "quick", YES); run(tmp_path, "full", YES)
    assert said(tmp_path, "17") == ("open", "full")
    write(tmp_path, "memory/56_far"); run(tmp_path, "quick", {"far_says": .9}, "memory/56_far")
    assert said(tmp_path, "17") == ("holds", "quick + full")
    assert entry(tmp_path, "17")["profiles"] == {"inside/20_lens": "full", "memory/56_far": "quick"}
    run(tmp_path, "quick", {"far_says": .1}, "memory/56_far")
    assert said(tmp_path, "17")[0] == "holds within limits"

def test_a_claim_is_open_while_one_of_its_chapters_declares_nothing(tmp_path):
    write(tree(tmp_path, lambda t: t["claims"][1].update(checks=["lens_says"]))); run(tmp_path, "quick", YES)
    assert said(tmp_path, "17")[0] == "open" and entry(tmp_path, "17")["why"] == "no check declared in memory/56_far"

def test_a_broken_wall_silences_its_chapter(tmp_path):
    write(tree(tmp_path)); run(tmp_path, "quick", YES | {"lens_exact": 1})
    assert said(tmp_path) == ("open", "quick") and entry(tmp_path, "6")["why"] == "a wall fails: lens_exact"

def test_a_moved_bound_moves_the_verdict_and_leaves_its_note(tmp_path):
    write(tree(tmp_path)); run(tmp_path, "quick", YES)
    tree(tmp_path, lambda t: (t["checks"]["lens_early"].update(bound=.95), t["amendments"].append({"check": "lens_early", "from": .5, "to": .95, "reason": "it was too kind"})))
    assert said(tmp_path) == ("holds within limits", "quick")
    assert ledger(tmp_path, key)["amendments"][0]["reason"] == "it was too kind"

def test_the_ledger_is_the_same_bytes_in_any_order(tmp_path):
    write(tree(tmp_path)); run(tmp_path, "quick", YES)
    one = write_ledger(tmp_path, key).read_bytes()
    path = tmp_path/"figures"/"quick"/"inside"/"20_lens"/"run.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(list(told.items()))) | {"checks": dict(reversed(list(told["checks"].items()))), "measured": {"wall_s": 9}}))
    assert write_ledger(tmp_path, key).read_bytes() == one
    assert [p.name for p in (tmp_path/"figures").iterdir() if p.is_file()] == ["ledger.json"]

def test_tables(tmp_path):
    write(tree(tmp_path)); run(tmp_path, "quick", YES); run(tmp_path, "full", YES | {"lens_says": (.7, .9)}, code="before")
    assert claims_table(tmp_path, key).loc["6", ["verdict", "decided by", "stale"]].tolist() == ["holds", "quick", "full: holds"]
    assert chapters_table(tmp_path, key).loc["inside/20_lens"].tolist() == ["What?", "6 holds (quick); 17 open (quick)", "2 min 5 s", "2 min 5 s on toy (stale)"]
    assert checks_table(tmp_path, key).query("claim == '6'").passes.tolist() == ["yes", "yes"]

# ---- this repository's register ----
ARGUMENT = {"1": "graph", "2": "hopfield", "3": "convolution", "4": "hopfield", "5": "markov", "6": "logit_lens", "7": "logit_lens", "8": "all_attention", "9": "substrate", "10": "schedules",
    "11": "scaling", "12": "scaling", "13a": "bptt", "13b": "bptt", "14": "bptt", "15": "bptt", "16": "linear_attention", "17": "linear_attention far_recall", "18a": "brackets", "18b": "brackets", "19": "rtrl",
    "19b": "rtrl_approximations", "20": "bank far_recall", "21": "far_recall", "22": "index", "23": "machines", "24": "machines", "25": "associations", "26": "commentary", "27": "commentary", "28": "retrieval"}

def stem(chapter): return re.sub(r"^\d+[a-z]?_", "", chapter.split("/")[-1])

def test_every_statement_of_the_argument_has_its_chapter():
    claims = {c["id"]: c for c in register["claims"]}
    assert list(claims) == list(ARGUMENT) and len(claims) == 31
    for i,names in ARGUMENT.items(): assert set(names.split()) <= {stem(c) for c in claims[i]["chapters"]} and stem(claims[i]["chapter"]) == names.split()[0]
    assert all(c["statement"].endswith(".") and len(c["statement"]) > 40 for c in claims.values())

def test_every_notebook_is_listed():
    written = {p.relative_to(root/"nbs").with_suffix("").as_posix() for p in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts} - {"index"}
    assert written <= set(register["chapters"]), f"add to `chapters` in data/claims.yaml: {sorted(written - set(register['chapters']))}"
    assert all(c["asks"].endswith("?") for c in register["chapters"].values())
    assert sum("minutes" in c for c in register["chapters"].values()) <= 8, "at most eight chapters may take more than four minutes"
    assert all(4 < c.get("minutes", 5) <= 10 for c in register["chapters"].values())

def test_no_check_is_loose():
    named = {n for c in register["claims"] for n in c["checks"]}
    loose = [n for n,c in register["checks"].items() if c["role"] != "wall" and n not in named]
    assert not loose, f"checks that decide no claim: {loose}"
    for n,c in register["checks"].items():
        assert re.fullmatch(r"[a-z0-9_]+", n) and n.startswith(stem(c["chapter"]).split("_")[0]), f"{n}: start with the chapter's name"
        assert math.isfinite(c["bound"])

def test_the_bibliography_is_sound():
    text = (root/"data"/"references.bib").read_text()
    keys = re.findall(r"^@\w+\{\s*([^,\s]+)\s*,", text, re.M)
    assert len(keys) == len(set(keys)), "a key is given twice"
    for part in re.split(r"(?m)^@", text)[1:]:
        assert all(re.search(rf"^\s*{f} = ", part, re.M) for f in ("title", "author", "year")), part[:60]
        assert part.count("{") == part.count("}"), part[:60]

def test_published_numbers_have_their_source():
    table = published()
    assert list(table.columns) == ["source", "where", "quantity", "value", "unit", "note"] and len(table) > 50
    assert set(table.source) <= bibkeys(root), set(table.source) - bibkeys(root)
    assert pd.to_numeric(table.value).notna().all() and (table["where"] != "").all() and not table.duplicated(["source", "where", "quantity"]).any()

def test_the_committed_ledger_follows_from_the_records():
    path = root/"figures"/"ledger.json"
    assert path.exists(), "figures/ledger.json is committed; memnotes ledger --write makes it"
    from memnotes.lab.run import code_key
    now = json.loads(json.dumps(ledger(root, code_key)))
    assert json.loads(path.read_text()) == now, "figures/ledger.json is out of date: run `memnotes ledger --write`"
