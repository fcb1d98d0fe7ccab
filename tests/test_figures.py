"Every committed figure is what its run.json says it is; a tampered one is found."
import hashlib, json
from pathlib import Path

import pytest

from memnotes.lab.experiment import LIMIT, uneven

root = Path(__file__).parent.parent
records = sorted((root/"figures").glob("**/run.json"))
sha256 = lambda p: hashlib.sha256(p.read_bytes()).hexdigest()

def audit(folder:Path)->list[str]:
    "What is wrong with a chapter's figures and their record."
    run, wrong = json.loads((folder/"run.json").read_text()), []
    seeds = {k: set(v) for k,v in run["seeds"].items()}
    if both := seeds["reporting"] & seeds["tuning"]: wrong.append(f"seeds overlap: {sorted(both)}")
    if 0 < len(seeds["reporting"]) < 5 and run["profile"] != "smoke": wrong.append(f"a statistic over {len(seeds['reporting'])} seeds")
    if odd := uneven(run["candidates"]): wrong.append(f"arms differ in candidates: {odd}")
    for slug,figure in run["figures"].items():
        if len(figure.get("alt", "").strip()) < 20: wrong.append(f"{slug}: no alt text")
        if {"svg", "csv"} - set(figure["sha256"]): wrong.append(f"{slug}: svg and csv need a sha256")
        wrong += [f"{slug}.{kind} is missing" for kind in ("svg", "png", "csv") if not (folder/f"{slug}.{kind}").exists()]
        wrong += [f"{slug}.{kind} does not match its sha256" for kind,sha in figure["sha256"].items() if (folder/f"{slug}.{kind}").exists() and sha256(folder/f"{slug}.{kind}") != sha]
    known = {"run.json"} | {f"{s}.{k}" for s,f in run["figures"].items() for k in {"svg", "png", "csv", *f["sha256"]}}
    for path in sorted(folder.iterdir()):
        if path.name not in known: wrong.append(f"{path.name} belongs to no figure")
        if path.suffix in (".svg", ".csv", ".html") and path.stat().st_size > LIMIT: wrong.append(f"{path.name} has {path.stat().st_size:,} bytes")
        if path.suffix == ".svg" and 'role="img"' not in path.read_text()[:1000]: wrong.append(f"{path.name} carries no description")
        if path.suffix == ".png" and path.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n": wrong.append(f"{path.name} is no png")
    for name,check in run["checks"].items():
        if check["role"] == "wall" and check["passed"] is not True: wrong.append(f"wall {name} does not hold")
    return wrong

@pytest.mark.parametrize("record", records, ids=lambda p: p.parent.relative_to(root/"figures").as_posix())
def test_committed_figures_are_what_was_recorded(record):
    run = json.loads(record.read_text())
    assert record.parent.relative_to(root/"figures").as_posix() == f"{run['profile']}/{run['chapter']}"
    assert audit(record.parent) == []
    assert {"parameters", "parent_commit", "code_key", "lock_sha256", "sources", "device", "versions", "measured"} <= set(run)
    assert {"wall_s", "peak_rss_mib"} <= set(run["measured"])

def test_all_figures_together_are_small():
    assert sum(p.stat().st_size for p in (root/"figures").rglob("*") if p.is_file()) <= 30 * 2**20 # some 80 chapters of a third of a MiB

def test_only_quick_and_full_are_committed():
    assert {p.parent.relative_to(root/"figures").parts[0] for p in records} <= {"quick", "full"}

# ---- the audit finds what it is for ----
@pytest.fixture
def folder(tmp_path):
    (tmp_path/"a.svg").write_text('<svg role="img"></svg>'), (tmp_path/"a.csv").write_text("x\n1\n"), (tmp_path/"a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    run = dict(chapter="inside/20_lens", profile="quick", seeds=dict(reporting=[0, 2, 4, 6, 8], tuning=[1, 3]), candidates={"LSTM": [1, 2], "GRU": [1, 2]}, checks={"w": dict(role="wall", passed=True)},
               figures={"a": dict(alt="A line that rises to the right.", measured=False, sha256={k: sha256(tmp_path/f"a.{k}") for k in ("svg", "csv")})})
    (tmp_path/"run.json").write_text(json.dumps(run))
    return tmp_path

def edit(folder, change):
    run = json.loads((folder/"run.json").read_text())
    change(run)
    (folder/"run.json").write_text(json.dumps(run))

def test_a_sound_folder_passes(folder): assert audit(folder) == []

@pytest.mark.parametrize("change,message", [
    (lambda r: r["seeds"]["tuning"].append(4), "seeds overlap: [4]"),
    (lambda r: r["seeds"].update(reporting=[0, 2]), "a statistic over 2 seeds"),
    (lambda r: r["candidates"]["GRU"].append(3), "arms differ in candidates"),
    (lambda r: r["figures"]["a"].update(alt="a line"), "a: no alt text"),
    (lambda r: r["figures"]["a"]["sha256"].pop("csv"), "a: svg and csv need a sha256"),
    (lambda r: r["checks"]["w"].update(passed=False), "wall w does not hold"),
    (lambda r: r["figures"].pop("a"), "a.csv belongs to no figure")])
def test_a_wrong_record_is_found(folder, change, message):
    edit(folder, change)
    assert any(w.startswith(message) for w in audit(folder))

@pytest.mark.parametrize("change,message", [
    (lambda f: (f/"a.csv").write_text("x\n2\n"), "a.csv does not match its sha256"),
    (lambda f: (f/"a.svg").unlink(), "a.svg is missing"),
    (lambda f: (f/"a.png").unlink(), "a.png is missing"),
    (lambda f: (f/"a.png").write_bytes(b"GIF"), "a.png is no png"),
    (lambda f: (f/"b.csv").write_text("x"), "b.csv belongs to no figure"),
    (lambda f: (f/"a.csv").write_text("x"*(LIMIT+1)), "a.csv has 307,201 bytes")])
def test_a_tampered_file_is_found(folder, change, message):
    change(folder)
    assert message in audit(folder)
