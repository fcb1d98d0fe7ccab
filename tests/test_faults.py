"Whatever is killed, and whenever: the same command completes, with the bytes of an undisturbed run, and nothing is left running."
import os, random, signal, time

import psutil, pytest
from tree import Tree, draw, heavy, light, write

LONG = bool(os.environ.get("LONG"))
moments = random.Random(20261123)
kinds = ["snakemake", "chapter", "kernel"]
kills = [(kinds[i % 3], round(moments.uniform(0, 5), 2)) for i in range(24 if LONG else 3)] + ([("memnotes", 1.), ("memnotes", 3.)] if LONG else [])

def put(tree, variant):
    tree.put("inside/20_lens", heavy, draw, variant=variant)
    tree.put("memory/50_bank", light, "import time\ntime.sleep(2)", write, variant=variant)

@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    "A tree to torment, and the bytes that undisturbed runs of both variants leave."
    calm, expected = Tree(tmp_path_factory.mktemp("calm")), []
    for variant in (1, 2):
        put(calm, variant)
        code, said = calm.memnotes("run", "--engine", "inline")
        assert code == 0, said
        expected.append(calm.files(".svg", ".csv"))
    assert len(expected[0]) == 3 and expected[0] != expected[1]
    return Tree(tmp_path_factory.mktemp("kills")), expected

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A tree with one light chapter, fresh."
    found = Tree(tmp_path_factory.mktemp("light"))
    found.put("memory/50_bank", light, "import time\ntime.sleep(1)", write)
    code, said = found.memnotes("run", "--engine", "inline")
    assert code == 0, said
    return found

def kill_one(tree, kind, delay):
    "SIGKILL a process of a kind, `delay` seconds after the first was seen; False if none lived so long."
    tree.appears(kind)
    time.sleep(delay)
    alive = tree.find(kind)
    try:
        if alive: alive[0].send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess: return False
    return bool(alive)

@pytest.mark.parametrize("turn,kind,delay", [(i, *k) for i, k in enumerate(kills)])
def test_kill(trees, turn, kind, delay):
    tree, expected = trees
    put(tree, 1 + turn % 2)
    child = tree.start("run")
    try:
        hit = kill_one(tree, kind, delay)
        said = child.communicate(timeout=120)[0]
        assert tree.quiet() == [], f"left running after the {kind} was killed"
        if hit and kind in ("chapter", "kernel"): assert child.returncode in (0, 1), said
        code, said = tree.memnotes("run")
        assert code == 0, said
        assert tree.files(".svg", ".csv") == expected[turn % 2]
        assert tree.quiet() == []
        assert not [p for p in (tree.root/"runs").rglob("*@*")], "temporary names were swept"
        assert not list((tree.root/"figures").rglob(".*"))
    finally: child.kill()

def test_ctrl_c_is_clean(tree):
    before = tree.files(".csv")
    child = tree.start("run", "--force")
    assert tree.appears("kernel")
    time.sleep(.5)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=30)[0]
    assert child.returncode == 130 and "stopped" in said and "Traceback" not in said, said
    assert tree.quiet() == []
    code, said = tree.memnotes("run")
    assert code == 0, said
    assert tree.files(".csv") == before

def test_ctrl_c_is_clean_inline(tree):
    child = tree.start("run", "bank", "--force", "--engine", "inline")
    assert tree.appears("kernel")
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=30)[0]
    assert child.returncode == 130 and "Traceback" not in said, said
    assert tree.quiet() == []

def test_a_lock_left_behind_is_removed(tree):
    locks = tree.root/".snakemake"/"locks"
    locks.mkdir(parents=True, exist_ok=True)
    for kind in ("input", "output"): (locks/f"0.{kind}.lock").write_text("runs/quick/inside/20_lens.ipynb\nruns/quick/memory/50_bank.ipynb\n")
    code, said = tree.memnotes("run", "--force")
    assert code == 0, said
    assert not list(locks.glob("*"))

def test_a_second_run_is_told_of_the_first(tree):
    child = tree.start("run", "bank", "--force")
    try:
        assert tree.appears("snakemake")
        code, said = tree.memnotes("run", "bank", "--force")
        assert code == 2 and f"process {child.pid}" in said
        assert child.wait(60) == 0
    finally: child.kill()

def test_an_altered_figure_is_made_again(tree):
    before = tree.files(".svg", ".csv")
    victim = tree.root/"figures/quick/memory/50_bank/line.csv"
    victim.write_text("x\n999\n")
    code, said = tree.memnotes("run")
    assert code == 0 and "1 to run, 0 fresh" in said and "line.csv changed on disk" in said, said
    assert tree.files(".svg", ".csv") == before

def test_a_chapter_that_takes_too_long_is_ended(tree):
    tree.put("memory/50_bank", light, "import time\ntime.sleep(100)", write)
    before = tree.files(".csv", ".svg")
    began = time.time()
    code, said = tree.memnotes("run", "bank", "--timeout", "0.1")
    assert code == 1 and "took longer than 0.1 minutes" in said and time.time() - began < 40, said
    assert tree.quiet() == [] and tree.files(".csv", ".svg") == before
