"""gcloud as far as launch/tpu_vm.py uses it: its state is a file, its TPU VMs are folders, its answers can fail.

$FAKE holds state.json: calls made, the calls at which it fails (before or after it has acted), queued resources and
nodes; how many of the next queued resources will fail; what it says to every call, if it refuses them all. A queued
resource moves on by one state each time it is listed. Unknown words are refused as gcloud does.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.launch.common import end_processes, make_home

FLAGS = {  # as `gcloud compute tpus ... --help` of release 500 and later lists them
    ("queued-resources", "create"): {
        *("zone", "project", "quiet", "node-id", "node-count", "node-prefix", "accelerator-type", "runtime-version"),
        *("spot", "reserved", "network", "subnetwork", "service-account", "labels"),
    },
    ("queued-resources", "delete"): {"zone", "project", "quiet", "force", "async"},
    ("queued-resources", "list"): {"zone", "project", "quiet", "format"},
    ("tpu-vm", "list"): {"zone", "project", "quiet", "format"},
    ("tpu-vm", "ssh"): {"zone", "project", "quiet", "worker", "command"},
    ("tpu-vm", "scp"): {"zone", "project", "quiet", "worker"},
}
NEXT = {"ACCEPTED": "PROVISIONING", "PROVISIONING": "ACTIVE", "ACTIVE": "ACTIVE"}
REASON = "the reservation has no such chips"


def folder() -> Path:
    return Path(os.environ["FAKE"])


def main(arguments: list[str]) -> int:
    with open(folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads((folder() / "state.json").read_text())
        words, flags = parse(arguments)
        number = state["calls"] = state["calls"] + 1
        failing = state["fail"].get(str(number))
        if "tail " in flags.get("command", ""):  # the log's reader runs beside the others: not counted
            state["calls"] -= 1
            failing = None
        (folder() / "state.json").write_text(json.dumps(state))
        if state.get("refuses"):
            print(state["refuses"], file=sys.stderr)
            return 1
        if failing == "before":
            print("ERROR: (gcloud) it did not work", file=sys.stderr)
            return 1
        act = None
        if words[:2] == ["queued-resources", "list"]:
            print(json.dumps(listed(state)))
        elif words[:2] == ["tpu-vm", "list"]:
            print(json.dumps([{"name": f"projects/p/{name}", **node} for name, node in state["nodes"].items()]))
        elif words[:2] == ["queued-resources", "create"]:
            create(state, words[2], flags)
        elif words[:2] == ["queued-resources", "delete"]:
            delete(state, words[2])
        else:
            act = workers_of(state, words, flags)
        (folder() / "state.json").write_text(json.dumps(state))
    if act:
        code = max(act(number) for number in range(2))
        if code:
            print("ERROR: (gcloud) a worker failed", file=sys.stderr)
            return code
    if failing == "after":
        print("ERROR: (gcloud) the connection was lost", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    assert arguments[:2] == ["compute", "tpus"], arguments
    words = [word for word in arguments[2:] if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in arguments[2:] if word.startswith("--"))
    if unknown := set(flags) - FLAGS[(words[0], words[1])]:
        sys.exit(f"ERROR: unrecognized arguments: {unknown}")
    assert flags["zone"] == "here-a" and "quiet" in flags
    return words, flags


def listed(state: dict) -> list[dict]:
    rows = []
    for name, resource in state["resources"].items():
        if resource["state"] in NEXT:
            resource["state"] = NEXT[resource["state"]]
        if resource["fails"] and resource["state"] == "ACTIVE":
            resource["state"] = "FAILED"
        if resource["state"] == "ACTIVE" and not resource["made"]:
            resource["made"] = True
            for node in resource["nodes"]:
                state["nodes"][node] = {"state": "READY", "networkEndpoints": [{}, {}]}
                for worker in range(2):
                    make_home(folder() / node / str(worker))
        count = len(resource["nodes"])
        several = {"multisliceParams": {"nodeCount": count, "nodeIdPrefix": name}}
        spec = {"node": {"acceleratorType": resource["accelerator"]}, **(several if count > 1 else {"nodeId": name})}
        told = {"state": resource["state"]}
        if told["state"] == "FAILED":
            told["failedData"] = {"error": {"code": 9, "message": REASON}}
        rows.append({"name": f"a/b/{name}", "state": told, "tpu": {"nodeSpec": [spec]}})
    return rows


def create(state: dict, name: str, flags: dict[str, str]) -> None:
    if name in state["resources"]:
        sys.exit("ERROR: ALREADY_EXISTS")
    count = int(flags.get("node-count", 0))
    nodes = [f"{flags['node-prefix']}-{number}" for number in range(count)] if count else [flags["node-id"]]
    assert flags["runtime-version"] == "v2-alpha-tpuv5-lite"
    kind = flags["accelerator-type"]
    fails = state.get("fails", 0) > 0
    state["fails"] = state.get("fails", 0) - fails
    made = {"state": "ACCEPTED", "nodes": nodes, "made": False, "accelerator": kind, "fails": fails}
    state["resources"][name] = made
    state["created"] += 1


def delete(state: dict, name: str) -> None:
    for node in state["resources"].pop(name)["nodes"]:
        state["nodes"].pop(node, None)
        end_processes(folder() / node)
        shutil.rmtree(folder() / node, ignore_errors=True)


def workers_of(state: dict, words: list[str], flags: dict[str, str]):
    """What ssh or scp does on one worker."""
    node = words[2] if words[1] == "ssh" else words[3].partition(":")[0]
    if state["nodes"].get(node, {}).get("state") != "READY":
        sys.exit(f"ERROR: {node} is not there")

    def act(worker: int) -> int:
        home = folder() / node / str(worker)
        if flags["worker"] not in ("all", str(worker)):
            return 0
        if words[1] == "scp":
            shutil.copy(words[2], home / Path(words[3].partition(":")[2]).name)
            return 0
        # The far end's /tmp and /dev/shm are folders of the worker too.
        command = flags["command"].replace("/tmp/maxlm", f"{home}/maxlm").replace("/dev/shm/maxlm", f"{home}/maxlm")
        environment = {"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin"}
        output = None if "tail " in command else subprocess.PIPE  # the log is streamed
        done = subprocess.run(["bash", "-c", command], env=environment, cwd=home, stdout=output, text=True)
        print(done.stdout or "", end="")
        return done.returncode

    return act


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
