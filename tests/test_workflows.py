"The workflows parse, trigger where they should, hold no more rights than they need, and call commands that exist."
import re
from pathlib import Path

import pytest, yaml

root = Path(__file__).parent.parent
flows = {p.stem:yaml.load(p.read_text(), yaml.BaseLoader) for p in (root/".github/workflows").glob("*.yaml")}
steps = lambda flow: [s for job in flow["jobs"].values() for s in job["steps"]]

def test_there_are_two():
    assert set(flows) == {"test", "figures"}

def test_triggers():
    assert set(flows["test"]["on"]) == {"push", "pull_request"}
    assert set(flows["figures"]["on"]) == {"push", "schedule", "workflow_dispatch"}, "a fork's pull request must never reach the GPU runner"
    assert flows["figures"]["on"]["push"]["branches"] == ["main"]

@pytest.mark.parametrize("name", flows)
def test_permissions_are_read_by_default(name):
    assert flows[name]["permissions"] == {"contents": "read"}

def test_only_the_proposing_job_may_write():
    writing = {(f, j) for f,flow in flows.items() for j,job in flow["jobs"].items() if "write" in (job.get("permissions") or {}).values()}
    assert writing == {("figures", "propose")}
    propose = flows["figures"]["jobs"]["propose"]
    assert "self-hosted" not in propose["runs-on"] and propose["if"] == "needs.full.outputs.changed == 'true'"

def test_the_gpu_runner_is_ephemeral():
    assert {"self-hosted", "gpu", "ephemeral"} <= set(flows["figures"]["jobs"]["full"]["runs-on"])

@pytest.mark.parametrize("name", flows)
def test_actions_are_pinned_to_a_release(name):
    uses = [s["uses"] for s in steps(flows[name]) if "uses" in s]
    assert uses and all(re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+\.\d+\.\d+", u) for u in uses), uses

@pytest.mark.parametrize("name", flows)
def test_checkouts_on_runners_that_run_our_code_keep_no_credentials(name):
    for job in flows[name]["jobs"].values():
        if "write" in (job.get("permissions") or {}).values(): continue
        assert all(s["with"]["persist-credentials"] == "false" for s in job["steps"] if s.get("uses", "").startswith("actions/checkout"))

@pytest.mark.parametrize("name", flows)
def test_commands_exist(name):
    from memnotes.lab.run import parser
    targets = set(re.findall(r"(?m)^([a-z][\w-]*):", (root/"Makefile").read_text()))
    runs = "\n".join(s["run"] for s in steps(flows[name]) if "run" in s)
    assert set(re.findall(r"\bmake ([a-z]\w*)", runs)) <= targets
    for command in re.findall(r"\.venv/bin/memnotes ([^\n|)]+)", runs):
        parser().parse_args(re.sub(r'"\$\w+"', "value", command).split())

@pytest.mark.parametrize("name", flows)
def test_no_untrusted_text_is_spliced_into_a_shell(name):
    runs = "\n".join(s["run"] for s in steps(flows[name]) if "run" in s)
    assert "${{" not in runs, "pass expressions through env, not into the script"
