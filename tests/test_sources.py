"Sources: verified or refused, fetched whole or not at all. A registry of one wheel stands in for the real one, so no test needs the network."
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from memnotes.core import sources as S

ROOT = Path(__file__).parents[1]
TEXT = b"In the beginning was the word.\n"*1000


def sha(data): return hashlib.sha256(data).hexdigest()


def make_wheel(folder, members, name="toy_words", version="1.0"):
    "A wheel that pip accepts, with `members` (inner name -> bytes); gives its path."
    info = f"{name}-{version}.dist-info"
    about = {f"{info}/METADATA":f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n".encode(),
             f"{info}/WHEEL":b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    files = members | about
    record = "".join(f"{n},,\n" for n in [*files, f"{info}/RECORD"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder/f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as z:
        for n,data in (files | {f"{info}/RECORD":record}).items(): z.writestr(n, data)
    return file


def listing(files): return sha("".join(f"{sha(d)}  {n}\n" for n,d in sorted(files.items())).encode()) if len(files) > 1 else sha(*files.values())


@pytest.fixture
def registry(tmp_path, monkeypatch):
    "A function that makes a root with one source `toy`, a registry with its wheel, and an empty cache."
    def make(members=None, payload=None, patterns=("*.txt",), **changed):
        members = {"toy_words/data/a.txt":TEXT, "toy_words/__init__.py":b"raise SystemExit('never imported')"} if members is None else members
        payload = {"a.txt":TEXT} if payload is None else payload
        file = make_wheel(tmp_path/"registry", members)
        entry = dict(what="words", kind="text", origin="pypi", package="toy-words", version="1.0", archive=file.name, archive_bytes=file.stat().st_size,
            archive_sha256=sha(file.read_bytes()), folder="toy_words/data", files=list(patterns), n_files=len(payload), bytes=sum(map(len, payload.values())),
            sha256=listing(payload), licence="ours", default=True) | changed
        (tmp_path/"data").mkdir(exist_ok=True)
        (tmp_path/"data"/"sources.toml").write_text("[toy]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k,v in entry.items()))
        return tmp_path/"cache"
    env = dict(MEMNOTES_ROOT=tmp_path, MEMNOTES_CACHE=tmp_path/"cache", PIP_NO_INDEX="1", PIP_FIND_LINKS=tmp_path/"registry", PIP_CONFIG_FILE=os.devnull, PIP_NO_CACHE_DIR="1")
    for k,v in env.items(): monkeypatch.setenv(k, str(v))
    return make


def names(cache): return sorted(f.relative_to(cache).as_posix() for f in cache.rglob("*") if f.is_file())


# what is fetched

def test_fetch_takes_the_payload_and_nothing_else(registry):
    cache = registry()
    seen = []
    file = S.fetch("toy", progress=lambda done,total: seen.append((done, total)))
    assert file == cache/"toy"/"a.txt" and file.read_bytes() == TEXT
    assert names(cache) == ["toy/a.txt"] and not list(cache.glob(".fetch-*"))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == S.source("toy").archive_bytes
    assert S.path("toy") == file and S.present("toy") and S.sha256("toy") == sha(TEXT)


def test_several_files_are_a_folder_and_keep_their_places(registry):
    payload = {"x/a.txt":b"abc", "y/a.txt":b"de"}
    registry({f"toy_words/data/{n}":d for n,d in payload.items()}, payload, ["*/*.txt"])
    folder = S.fetch("toy")
    assert {f.relative_to(folder).as_posix():f.read_bytes() for f in folder.rglob("*.txt")} == payload
    (folder/"x"/"a.txt").rename(folder/"x"/"b.txt")
    with pytest.raises(ValueError, match="altered"): S.path("toy")


def test_a_second_fetch_does_not_ask_the_registry(registry, tmp_path):
    registry()
    file = S.fetch("toy")
    shutil.rmtree(tmp_path/"registry")
    assert S.fetch("toy") == file


def test_the_cache_is_where_it_is_told_to_be(registry, tmp_path, monkeypatch):
    registry()
    S.fetch("toy")
    monkeypatch.setenv("MEMNOTES_CACHE", str(tmp_path/"elsewhere"))
    assert not S.present("toy") and S.cache_root() == tmp_path/"elsewhere"
    assert S.fetch("toy").is_relative_to(tmp_path/"elsewhere")
    monkeypatch.delenv("MEMNOTES_CACHE")
    assert S.cache_root() == tmp_path/"data"/"cache"


# what is refused

def test_missing_names_the_remedy(registry):
    registry()
    with pytest.raises(FileNotFoundError, match="memnotes fetch toy"): S.path("toy")
    assert not S.present("toy")


@pytest.mark.parametrize("damage,said", [
    (lambda f: f.write_bytes(TEXT[:-1]), "truncated or altered"),
    (lambda f: f.write_bytes(b""), "truncated or altered"),
    (lambda f: f.write_bytes(TEXT[:-2] + b"!\n"), "its sha256 is"),
    (lambda f: (f.parent/"b.txt").write_bytes(b"more"), "2 file"),
], ids=["truncated", "empty", "tampered", "added"])
def test_damage_is_found_and_repaired(registry, damage, said):
    registry()
    file = S.fetch("toy")
    damage(file)
    with pytest.raises(ValueError, match=said) as e: S.path("toy")
    assert "memnotes fetch toy" in str(e.value) and not S.present("toy")
    assert S.fetch("toy").read_bytes() == TEXT and S.present("toy")


def test_damage_with_size_and_time_restored_is_found_by_a_new_process(registry):
    registry()
    file = S.fetch("toy")
    stat = file.stat()
    file.write_bytes(TEXT[:-2] + b"!\n")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    got = subprocess.run([sys.executable, "-c", "from memnotes.core.sources import path; path('toy')"], capture_output=True, text=True, cwd=ROOT)
    assert got.returncode and "its sha256 is" in got.stderr


def test_bytes_are_read_once_a_process(registry, monkeypatch):
    registry()
    S.fetch("toy")
    monkeypatch.setattr(S, "digest", lambda *a: pytest.fail("read again"))
    assert S.path("toy").read_bytes() == TEXT


def test_another_archive_is_refused_before_it_is_opened(registry):
    cache = registry(archive_sha256="0"*64)
    with pytest.raises(ValueError, match="not the archive"): S.fetch("toy")
    assert names(cache) == []


def test_another_payload_in_the_right_archive_is_refused(registry):
    cache = registry(sha256="0"*64)
    with pytest.raises(ValueError, match="its sha256 is"): S.fetch("toy")
    assert names(cache) == [] and not (cache/"toy").exists()


@pytest.mark.parametrize("inner", ["toy_words/data/../../evil.txt", "toy_words/data//../../../evil.txt"])
def test_an_archive_cannot_write_elsewhere(registry, tmp_path, inner):
    cache = registry({inner:TEXT})
    with pytest.raises(ValueError, match="outside its folder"): S.fetch("toy")
    assert not list(tmp_path.rglob("evil.txt")) and names(cache) == []


def test_an_archive_that_holds_too_much_is_broken_off(registry):
    cache = registry({"toy_words/data/a.txt":TEXT*100})
    with pytest.raises(ValueError, match="holds more than"): S.fetch("toy")
    assert names(cache) == []


def test_offline_says_what_to_do(registry, tmp_path, monkeypatch):
    cache = registry()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path/"nowhere"))
    with pytest.raises(ConnectionError, match="pip download toy-words==1.0") as e: S.fetch("toy")
    assert "memnotes fetch toy" in str(e.value) and str(cache/"toy") in str(e.value)
    assert names(cache) == []


def test_debian_package_without_debian(registry, monkeypatch):
    registry(origin="debian")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="apt-get is not on this machine"): S.fetch("toy")


def test_names_that_are_none():
    with pytest.raises(ValueError, match="did you mean 'factbook'"): S.path("factbok")
    with pytest.raises(ValueError, match="did you mean 'smollm2-135m'"): S.fetch("smollm2")
    with pytest.raises(ValueError, match="known are smollm2-135m"): S.present("zzzzzz")
    with pytest.raises(TypeError, match="name must be a str"): S.sha256(None)


def test_hub_needs_its_package_and_the_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"): S.fetch("hf:gpt2")
    assert not S.present("hf:gpt2")
    monkeypatch.undo()
    pytest.importorskip("huggingface_hub")
    with pytest.raises(FileNotFoundError, match="memnotes fetch hf:memnotes/no-such-model"): S.path("hf:memnotes/no-such-model")


def test_hub_asks_for_safe_formats_only(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **k: asked.update(k, repo=repo) or str(tmp_path))
    assert S.fetch("hf:datasets/some/texts") == tmp_path
    assert (asked["repo"], asked["repo_type"], asked["local_files_only"]) == ("some/texts", "dataset", False)
    assert {"*.bin", "*.pkl", "*.pt"} <= set(asked["ignore_patterns"])
    S.path("hf:gpt2")
    assert (asked["repo"], asked["repo_type"], asked["local_files_only"]) == ("gpt2", "model", True)


# at the same time, and interrupted

FETCH = "import sys; from memnotes.core.sources import fetch; sys.stdout.write(fetch('toy').read_text()[:16])"


def test_concurrent_fetches_agree(registry):
    cache = registry()
    procs = [subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    for p in procs:
        out, err = p.communicate(timeout=120)
        assert (p.returncode, out) == (0, "In the beginning"), err
    assert names(cache) == ["toy/a.txt"] and not list(cache.glob(".fetch-*"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_fetch_leaves_nothing_half_written(registry, how):
    cache = registry()
    p = subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    end = time.time() + 60
    while not list(cache.glob(".fetch-*/wanted.txt")) and p.poll() is None and time.time() < end: time.sleep(0.005)
    p.send_signal(how)
    p.wait(60)
    assert p.returncode and not (cache/"toy").exists()
    if how == signal.SIGINT: assert not list(cache.glob(".fetch-*"))
    assert S.fetch("toy").read_bytes() == TEXT
    assert names(cache) == ["toy/a.txt"] and not list(cache.glob(".fetch-*"))


# the list, and the module

def test_the_list_is_complete():
    for s in S.sources():
        assert s.what and s.licence and s.home and s.kind in ("weights", "tokenizer", "text", "images"), s.name
        if s.origin != "interpreter": assert len(s.sha256) == 64 and s.bytes > 0 and s.n_files > 0 and s.version and s.archive, s.name
    assert [s.name for s in S.sources() if s.default] == ["smollm2-135m", "gpt2-bpe", "factbook", "kjv", "digits"]


def test_published_digests_are_ours():
    "Digests noted when the sources were chosen, of single files and of the factbook's files joined."
    known = {"encoder.json":"196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783", "vocab.bpe":"1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"}
    folder = S.path("gpt2-bpe")
    assert {f.name:sha(f.read_bytes()) for f in folder.iterdir()} == known
    joined = b"".join(f.read_bytes() for f in sorted(S.path("factbook").rglob("*.json")))
    assert sha(joined) == "acc210407ed6b6434e32f95cbd1e5d28e4936096fc97ec2fc6e1cfa96f379ad8"


def test_roots(tmp_path, monkeypatch):
    monkeypatch.delenv("MEMNOTES_ROOT", raising=False)
    monkeypatch.chdir(ROOT/"nbs")
    assert S.repo_root() == ROOT
    monkeypatch.chdir(tmp_path)
    (tmp_path/"settings.ini").write_text("lib_name = other\n")
    assert S.repo_root() == ROOT
    monkeypatch.setenv("MEMNOTES_ROOT", str(tmp_path/"gone"))
    with pytest.raises(FileNotFoundError, match="MEMNOTES_ROOT"): S.repo_root()
    monkeypatch.setenv("MEMNOTES_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sources.toml is missing"): S.sources()


def test_the_module_is_light():
    code = "import sys, memnotes.core.sources; print(sorted({'torch', 'lightning', 'numpy', 'pandas', 'rich', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


def test_readers_can_be_imported_from_here():
    from memnotes.core.corpora import TextCorpus
    from memnotes.core.images import ImageSet
    assert (S.TextCorpus, S.ImageSet) == (TextCorpus, ImageSet)
    with pytest.raises(AttributeError): S.TextCorpos
    with pytest.raises(ImportError): exec("from memnotes.core.sources import nothing")
