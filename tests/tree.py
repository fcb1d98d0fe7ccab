"A repository in miniature, with the real package and Snakefile, for tests that kill, break and edit."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat, psutil

root = Path(__file__).parent.parent

light = '''import os, pathlib
import memnotes.core.sources'''
write = '''folder = pathlib.Path(os.environ["MEMNOTES_OUT"])
(folder/"line.csv").write_text(f"x\\n{seed + variant}\\n")'''
heavy = '''import time
import pandas as pd, seaborn as sns
from memnotes.lab.experiment import Experiment'''
draw = '''exp = Experiment("inside/20_lens", profile, seed)
time.sleep(1)
data = pd.DataFrame({"x": range(5), "y": [variant*i*i for i in range(5)]})
ax = sns.lineplot(data=data, x="x", y="y")
exp.figure("parabola", ax.figure, data=data, alt="A parabola that rises from zero to sixteen.", title="It rises")'''

def notebook(imports, *cells, tags=("parameters",), variant=1):
    code = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")))
    nb.cells = [nbformat.v4.new_markdown_cell("# A title\n\n> A claim."), code(imports), code('profile = "smoke"\nseed = 0', metadata=dict(tags=list(tags))),
                code(f"variant = {variant}"), *map(code, cells)]
    return nb

class Tree:
    "A miniature repository in a folder."
    def __init__(self, folder):
        self.root = Path(folder).resolve()
        for name in ("settings.ini", "requirements.lock", "Snakefile"): shutil.copy(root/name, self.root/name)
        shutil.copytree(root/"memnotes", self.root/"memnotes", ignore=shutil.ignore_patterns("__pycache__"))
        (self.root/"data").mkdir()
        (self.root/"data"/"references.bib").write_text("@article{a2020,\n title = {A}\n}\n")
        (self.root/"data"/"sources.toml").write_text((root/"data"/"sources.toml").read_text())
        self.claims(1.)

    def claims(self, bound):
        (self.root/"data"/"claims.yaml").write_text(f'''chapters:
  inside/20_lens: {{asks: "Does it rise?"}}
  memory/50_bank: {{asks: "Does it hold?"}}
checks:
  lens_rises: {{chapter: inside/20_lens, role: claim, relation: ">=", bound: {bound}, says: "it rises"}}
claims:
  - {{id: "1", statement: "It rises.", sources: [a2020], chapter: inside/20_lens, checks: [lens_rises]}}
''')

    def put(self, chapter, *cells, **how):
        path = self.root/"nbs"/f"{chapter}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook(*cells, **how), path)
        return path

    def edit(self, chapter, change):
        "Apply `change` to the notebook's cells."
        path = self.root/"nbs"/f"{chapter}.ipynb"
        nb = json.loads(path.read_text())
        change(nb["cells"])
        path.write_text(json.dumps(nb))

    def start(self, *args, **how):
        env = {k: v for k, v in os.environ.items() if not k.startswith("MEMNOTES_")}
        env |= dict(MEMNOTES_ROOT=str(self.root), PYTHONPATH=str(self.root), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", COLUMNS="200")
        return subprocess.Popen([sys.executable, "-m", "memnotes.lab.run", *args], cwd=self.root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **how) # a shell's background job would inherit it ignored

    def memnotes(self, *args, timeout=240):
        "Run to the end: (exit code, what it said)."
        child = self.start(*args)
        try: said = child.communicate(timeout=timeout)[0]
        finally: child.kill()
        return child.returncode, said

    def files(self, *kinds, under="figures/quick"):
        return {str(p.relative_to(self.root)): p.read_bytes() for p in sorted((self.root/under).rglob("*")) if p.suffix in kinds}

    def processes(self):
        "Everything at work here: kernels and what they started, chapter processes, snakemake."
        found = []
        for p in psutil.process_iter():
            try:
                env = p.environ()
                if p.pid != os.getpid() and env.get("MEMNOTES_ROOT") == str(self.root) and p.status() != psutil.STATUS_ZOMBIE: found.append(p)
            except (psutil.Error, OSError): pass
        return found

    def quiet(self, seconds=8):
        "Wait until nothing is at work here; what is left."
        end = time.time() + seconds
        while (left := self.processes()) and time.time() < end: time.sleep(.1)
        return [" ".join(p.cmdline()[:6]) for p in left if p.is_running()]

    def appears(self, kind, seconds=60):
        "Wait until a process of a kind is at work here; False if none came."
        end = time.time() + seconds
        while not (found := self.find(kind)) and time.time() < end: time.sleep(.02)
        return bool(found)

    def find(self, kind):
        "Processes of a kind: memnotes, snakemake, chapter or kernel."
        def is_(p):
            try: line = " ".join(p.cmdline())
            except psutil.Error: return False
            if kind == "kernel": return "ipykernel_launcher" in line
            if kind == "chapter": return "--scheduled" in line and "-m memnotes.lab.run" in line and not line.startswith(("/bin/", "bash", "/usr/bin/bash"))
            if kind == "snakemake": return "-m snakemake" in line
            return "-m memnotes.lab.run" in line and "--scheduled" not in line
        return [p for p in self.processes() if is_(p)]
