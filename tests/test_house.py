"The walls of the house: imports run one way, notebooks stay small and clean, the package imports quickly, README's commands exist."
import ast, builtins, dis, importlib.util, json, re, subprocess, sys, types
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
modules = sorted(p for p in (root/"memnotes").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
parts = ["attention", "inside", "training", "horizon", "memory"]
name = lambda p: p.relative_to(root).as_posix()

def config():
    c = ConfigParser(delimiters=["="])
    c.read(root/"settings.ini", encoding="utf-8")
    return c["DEFAULT"]

def imported(path):
    "memnotes modules that a file imports, at any depth of nesting."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.startswith("memnotes."))
        elif isinstance(node, ast.ImportFrom):
            base = "memnotes" if node.level else ""
            if node.level: base = ".".join(path.relative_to(root).with_suffix("").parts[:-node.level])
            full = ".".join(filter(None, [base, node.module or ""]))
            if full.split(".")[0] == "memnotes": yield full if full.count(".") >= 2 else f"{full}.{node.names[0].name}"

def unknown_globals(module):
    "Names that a module's functions look up and that neither the module nor Python has: an import left in a notebook's own cells."
    code = [c for c in compile(Path(module.__file__).read_text(encoding="utf-8"), module.__file__, "exec").co_consts if isinstance(c, types.CodeType)]
    while code:
        here = code.pop()
        code += [c for c in here.co_consts if isinstance(c, types.CodeType)]
        yield from (i.argval for i in dis.get_instructions(here) if i.opname == "LOAD_GLOBAL" and not hasattr(module, i.argval) and not hasattr(builtins, i.argval))

def may_import(part, module, other):
    "DESIGN: core ← the five parts; core.sources ← lab; memory may use horizon."
    if other.startswith("memnotes._modidx") or part == other: return True
    if part == "lab": return module.startswith("memnotes.core.") if other == "core" else False
    if other == "core": return part in parts
    return (part, other) == ("memory", "horizon")

@pytest.mark.parametrize("path", modules, ids=name)
def test_imports_run_one_way(path):
    part = path.relative_to(root/"memnotes").parts[0]
    wrong = [m for m in imported(path) if not may_import(part, m, m.split(".")[1])]
    assert not wrong, f"{name(path)} imports {wrong}"

@pytest.mark.parametrize("path", modules, ids=name)
def test_functions_find_every_name_they_use(path):
    assert not set(unknown_globals(importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))))

def test_a_missing_import_is_found(tmp_path):
    (tmp_path/"m.py").write_text("def f(x): return [missing(y) for y in x]", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("m", tmp_path/"m.py")
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    assert set(unknown_globals(m)) == {"missing"}

def test_the_import_rule_can_fail(tmp_path):
    assert not may_import("core", "memnotes.lab.experiment", "lab")
    assert not may_import("attention", "memnotes.inside.logit_lens", "inside")
    assert may_import("inside", "memnotes.core.sequence", "core") and may_import("memory", "memnotes.horizon.rtrl", "horizon")

@pytest.mark.parametrize("path", notebooks, ids=name)
def test_notebook_is_small_and_clean(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size <= 200_000, "a notebook is at most 200 KB"
    first = "".join(nb["cells"][0]["source"])
    assert first.startswith("# ") and "\n> " in first, "the first cell is a title and a one-line claim"
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert not any(c["outputs"] or c["execution_count"] for c in code), "committed without outputs"
    lines = [sum(bool(x.strip()) for x in "".join(c["source"]).split("\n")) for c in code]
    assert max(lines) <= 30, f"a cell of {max(lines)} lines"
    assert not any("eval: false" in "".join(c["source"]) for c in code), "Papermill runs muted cells: a muted cell is untested"
    if path.parent.name in parts:
        words = sum(len("".join(c["source"]).split()) for c in nb["cells"] if c["cell_type"] == "markdown")
        assert len(nb["cells"]) <= 75 and sum(lines) <= 350 and words >= 500, (len(nb["cells"]), sum(lines), words)

@pytest.mark.parametrize("path", [p for p in notebooks if p.name != "index.ipynb"], ids=name)
def test_notebook_has_parameters_and_install_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = lambda tag: ["".join(c["source"]) for c in cells if tag in c["metadata"].get("tags", [])]
    assert tagged("parameters") == ['profile = "smoke"\nseed = 0']
    install, = tagged("colab")
    assert f'@v{config()["version"]}"' in install and '"google.colab" in sys.modules' in install, "the install cell is guarded and pinned to the release"
    assert f"/{name(path)}" in "".join(cells[0]["source"]), "the Colab badge in the title cell opens this notebook"

def test_every_module_has_its_notebook():
    exported = {re.search(r"(?m)^#\| default_exp (\S+)", "".join(c["source"])).group(1) for p in notebooks for c in json.loads(p.read_text(encoding="utf-8"))["cells"]
                if c["cell_type"] == "code" and "#| default_exp" in "".join(c["source"])}
    assert exported == {".".join(p.relative_to(root/"memnotes").with_suffix("").parts) for p in modules}

def test_import_takes_at_most_a_fifth_of_a_second():
    code = "import time; t = time.perf_counter(); import memnotes, sys; print(time.perf_counter() - t); assert 'torch' not in sys.modules"
    took = min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3))
    assert took <= .2

def test_wheel_holds_every_subpackage():
    from setuptools import find_packages
    assert {"memnotes", "memnotes.lab", "memnotes.core", "memnotes.inside"} <= set(find_packages(str(root), include=["memnotes", "memnotes.*"]))

def test_version_is_one():
    import memnotes
    assert memnotes.__version__ == config()["version"]
    assert f"version: {memnotes.__version__}" in (root/"CITATION.cff").read_text()

def make_targets():
    return set(re.findall(r"(?m)^([a-z][\w-]*):", (root/"Makefile").read_text()))

def test_commands_named_in_documents_exist():
    verbs = set(re.findall(r"add_parser\(\s*[\"'](\w+)", (root/"memnotes/lab/run.py").read_text()))
    for doc in ("README.md", "CONTRIBUTING.md"):
        text = (root/doc).read_text(encoding="utf-8")
        blocks = " ".join(re.findall(r"`([^`\n]+)`", text) + re.findall(r"```\w*\n(.*?)```", text, re.S))
        assert set(re.findall(r"\bmake ([a-z]\w*)", blocks)) <= make_targets(), doc
        assert set(re.findall(r"\bmemnotes ([a-z]\w*)\b(?!\.)", blocks)) <= verbs, doc

def test_nothing_unpickles():
    pattern = re.compile(r"pickle\.load|allow_pickle\s*=\s*True|weights_only\s*=\s*False|read_pickle")
    assert not [name(p) for p in modules if pattern.search(p.read_text(encoding="utf-8"))]
