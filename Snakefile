# One rule for a chapter, one for the ledger. `memnotes run` calls this with runs/plan.json as its configuration (profile, chapters, parameters,
# timeout); `snakemake --cores 2` alone runs every chapter at profile quick. Figures are no output of a rule: Snakemake deletes outputs before a
# job and after a failed one, and a chapter that fails keeps its old figures.
import sys
from functools import lru_cache
from pathlib import Path

root = Path(workflow.basedir)
sys.path.insert(0, str(root))
from memnotes.lab.chapter import LEDGER, Run, chapters, inputs, minutes

profile = config.get("profile", "quick")
names = config.get("chapters") or chapters(root)
extra = config.get("parameters") or {}
options = [f"--timeout={config['timeout']}"] if config.get("timeout") else []
options += [f"--param={name}={json.dumps(value)}" for name, value in extra.items()]

output_of = lambda name: f"runs/{profile}/{name}.ipynb"

@lru_cache(maxsize=None)
def given(profile, chapter): return inputs(Run(chapter, profile, root), extra)

def before(wildcards):
    "The notebook; for the ledger's chapter also the others of this run, so that it comes last."
    others = [output_of(n) for n in names if n != LEDGER] if wildcards.chapter == LEDGER else []
    return [f"nbs/{wildcards.chapter}.ipynb", *others]

wildcard_constraints:
    profile = "smoke|quick|full",
    chapter = r"([a-z]+/)?\d\d[a-z]?_\w+",

localrules: all, ledger

rule all:
    input: f"runs/{profile}/ledger.stamp"

rule ledger:
    input: [output_of(n) for n in names]
    output: touch("runs/{profile}/ledger.stamp")
    shell: "{sys.executable:q} -m memnotes.lab.run ledger --write"

rule chapter:
    input: before
    output: "runs/{profile}/{chapter}.ipynb"
    params:
        code_key = lambda w: given(w.profile, w.chapter)["code_key"],
        parameters = lambda w: given(w.profile, w.chapter)["parameters"],
        bounds = lambda w: given(w.profile, w.chapter)["bounds_sha256"],
        sources = lambda w: given(w.profile, w.chapter)["sources"],
        lock = lambda w: given(w.profile, w.chapter)["lock_sha256"],
        options = options,
    resources: runtime = lambda w: int(config.get("timeout") or minutes(Run(w.chapter, w.profile, root))) + 5
    threads: 1
    log: "runs/{profile}/{chapter}/run.log"
    # `exec` makes the chapter process a child of Snakemake itself, so that it can die with it.
    shell:
        "MEMNOTES_PARENT=$PPID exec {sys.executable:q} -m memnotes.lab.run run {wildcards.chapter} --profile {wildcards.profile} "
        "--engine inline --force --scheduled {params.options:q} > {log} 2>&1"
