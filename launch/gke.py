"""A job on GKE: a JobSet for TPU slices or GPU nodes, as one manifest.

python -m launch.gke apply --accelerator=v5p --topology=2x2x4 [--slices=2] [--spot] --image=IMAGE --config=... ...
python -m launch.gke apply --accelerator=nvidia-h100-80gb --nodes=4 --gpus=8 --image=IMAGE --config=... --workdir=gs://...
python -m launch.gke manifest | delete | xpk    (the same flags)

A pod that is moved or preempted gets SIGTERM, all pods save and leave with exit code 75, and the JobSet starts anew
without counting it, as it does after the loss of a pod (69) and where not all have come (68); failures count up to
--retries. `apply` of a job that has ended starts it again; one of other settings is first to be deleted.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.job import (
    EXIT_PREEMPTED,
    SLOW_SECONDS,
    Job,
    LaunchError,
    Topology,
    ask_tool,
    check_config,
    check_shared,
    commit_digest,
    job_of,
    job_parser,
    printed,
    run_main,
    secret_values,
    split_overrides,
    spot_note,
    there,
    tpu_devices,
)
from launch.patch import merged, read_patch
from maxlm.heartbeat import EXIT_LOST
from maxlm.rollcall import CODE, EXIT_ABSENT

PORT = 8476
SETTINGS = "maxlm/settings"  # annotation: a digest of the manifest as it was applied
_NAMESPACE = "default"
# Not the run's fault: the same again may well work. A process whose work failed leaves with 1, as do all that it tells.
UNCOUNTED = [EXIT_ABSENT, EXIT_LOST, EXIT_PREEMPTED]


class TpuKind(NamedTuple):
    """A TPU generation on GKE: its node label, name to xpk, chips that a host may have besides the usual ones."""

    label: str
    xpk: str
    hosts: tuple[int, ...] = ()


HOST_CHIPS = 4  # of a host in a slice of several hosts
TPUS = {
    "v4": TpuKind("tpu-v4-podslice", "v4"),
    "v5e": TpuKind("tpu-v5-lite-podslice", "v5litepod", hosts=(1, 8)),
    "v5p": TpuKind("tpu-v5p-slice", "v5p"),
    "v6e": TpuKind("tpu-v6e-slice", "v6e", hosts=(1, 8)),
    "tpu7x": TpuKind("tpu7x", "tpu7x"),
}
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]*")
_BUCKET = re.compile(r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]")
_TPU_CORES = {"v4": 2, "v5p": 2, "tpu7x": 2}  # the accelerator's name counts these, not chips
_CPU, _MEMORY = re.compile(r"\d+(\.\d+)?m?"), re.compile(r"\d+(\.\d+)?([KMGT]i?)?")
# What each of a pod's accelerators asks for, unless told otherwise: small enough for every machine type that has one.
_CPU_EACH, _GIB_EACH = 2, 8
SPOT_SECONDS = 15  # that GKE leaves a pod on a spot node, or up to 25, whatever the pod asks for


def chips_of(topology: str) -> int:
    """Chips of a topology as in 4x4 or 2x2x4."""
    if not re.fullmatch(r"\d+(x\d+){1,2}", topology):
        raise LaunchError(f"--topology is {topology!r}; give the slice's shape, as in 4x4 or 2x2x4")
    return math.prod(int(size) for size in topology.split("x"))


def shape_of(values: argparse.Namespace) -> Topology:
    """Groups and hosts of the flags. Raises LaunchError where TPU and GPU flags are mixed."""
    if values.accelerator in TPUS:
        chips = chips_of(values.topology)
        each = values.chips or min(chips, HOST_CHIPS)
        if each not in (HOST_CHIPS, min(chips, HOST_CHIPS), *TPUS[values.accelerator].hosts):
            raise LaunchError(f"--chips is {each}; hosts of {values.accelerator} have {HOST_CHIPS}, or all of a slice")
        if chips % each:
            raise LaunchError(f"--topology={values.topology} has {chips} chips, which hosts of {each} do not divide")
        if each != HOST_CHIPS and chips != each:
            raise LaunchError(f"--chips={each} is for slices of one such host; hosts of several have {HOST_CHIPS}")
        if chips == each and values.slices > 1:
            raise LaunchError(
                f"--slices={values.slices} of --topology={values.topology}: Google joins slices of several hosts only; "
                "give a larger --topology, of one slice"
            )
        return Topology(groups=values.slices, hosts=chips // each, accelerator=values.accelerator, devices=each)
    if values.topology or values.chips or not values.accelerator.startswith("nvidia-"):
        raise LaunchError(
            f"--accelerator is {values.accelerator!r}; give {', '.join(TPUS)} with --topology, or a GPU as GKE "
            "names it, as in nvidia-h100-80gb, with --nodes and --gpus alone"
        )
    return Topology(groups=values.slices, hosts=values.nodes, accelerator=values.accelerator, devices=values.gpus)


def devices_of(shape: Topology, values: argparse.Namespace) -> int | None:
    """JAX devices of all slices or nodes; None: the slice is not one that is known."""
    if shape.accelerator in TPUS:
        return tpu_devices(f"{shape.groups}*{shape.accelerator}:{values.topology}")
    return shape.groups * shape.hosts * shape.devices


def manifest(job: Job, values: argparse.Namespace) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2)."""
    shape = job.topology
    annotations = {}
    if shape.accelerator in TPUS:  # a slice is a node pool, and belongs to one job
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    labels = {"app.kubernetes.io/managed-by": "maxlm"}
    if values.queue:
        labels["kueue.x-k8s.io/queue-name"] = values.queue
    # A pod that leaves with one of these, or whose node is taken, fails its job for this reason; others just fail.
    leaves = [
        {"action": "FailJob", "onExitCodes": {"containerName": "maxlm", "operator": "In", "values": UNCOUNTED}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    made: dict[str, Any] = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, "labels": labels, "annotations": annotations},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {
                "maxRestarts": job.retries,
                "restartStrategy": "BlockingRecreate",  # the old pods have saved before the first new one is there
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "coordinator": {"replicatedJob": "workers", "jobIndex": 0, "podIndex": 0},
            "replicatedJobs": [
                {
                    "name": "workers",
                    "replicas": shape.groups,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "parallelism": shape.hosts,
                            "completions": shape.hosts,
                            "backoffLimit": 0,
                            "podFailurePolicy": {"rules": leaves},
                            "template": _pod_template(job, values),
                        }
                    },
                }
            ],
        },
    }
    annotations[SETTINGS] = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
    return made


def _pod_template(job: Job, values: argparse.Namespace) -> dict[str, Any]:
    annotations = {"gke-gcsfuse/volumes": "true"} if values.mount_bucket else {}
    made = {"metadata": {"annotations": annotations}, "spec": _pod(job, values)}
    return merged(made, read_patch(Path(values.pod_patch))) if values.pod_patch else made


def _pod(job: Job, values: argparse.Namespace) -> dict[str, Any]:
    shape = job.topology
    tpu = TPUS.get(shape.accelerator)
    device = "google.com/tpu" if tpu else "nvidia.com/gpu"
    selector = (
        {"cloud.google.com/gke-tpu-accelerator": tpu.label, "cloud.google.com/gke-tpu-topology": values.topology}
        if tpu
        else {"cloud.google.com/gke-accelerator": shape.accelerator}
    )
    tolerations = [{"key": device, "operator": "Exists", "effect": "NoSchedule"}]
    if values.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations += [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    volumes, mounts = _volumes(values)
    # A pod that asks for no processors and memory is the first to be put out where a node runs short of them.
    asked = {
        device: str(shape.devices),
        "cpu": values.cpu or str(_CPU_EACH * shape.devices),
        "memory": values.memory or f"{_GIB_EACH * shape.devices}Gi",
    }
    return {
        "restartPolicy": "Never",
        "serviceAccountName": values.service_account or "default",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "volumes": volumes,
        "containers": [
            {
                "name": "maxlm",
                "image": values.image,
                # No shell: Kubernetes itself expands $(NAME), which $$ prevents.
                "command": ["python", *(_literal(word) for word in job.arguments())],
                "env": _environment(job),
                "ports": [{"name": "coordinator", "containerPort": PORT}],
                "resources": {"requests": asked, "limits": {device: str(shape.devices)}},
                "volumeMounts": mounts,
                # The signal at once, and the pod stays until the process has saved and gone; grace seconds at most.
                "lifecycle": {
                    "preStop": {
                        "exec": {
                            "command": ["/bin/sh", "-c", "kill -TERM 1; while kill -0 1 2>/dev/null; do sleep 1; done"]
                        }
                    }
                },
            }
        ],
    }


def _volumes(values: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if values.mount_bucket:
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {"bucketName": values.mount_bucket}}
        volumes.append({"name": "bucket", "csi": driver})
        mounts.append({"name": "bucket", "mountPath": "/bucket"})
    if values.mount_claim:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": values.mount_claim}})
        mounts.append({"name": "claim", "mountPath": "/claim"})
    return volumes, mounts


def _environment(job: Job) -> list[dict[str, Any]]:
    plain = {"PYTHONUNBUFFERED": "1", CODE: commit_digest(job.commit), **job.environment}
    plain |= {
        "JOBSET_COORDINATOR": f"{job.name}-workers-0-0.{job.name}:{PORT}",
        "JOBSET_PROCESSES": str(job.topology.all_processes),
        "JOBSET_HOSTS_PER_JOB": str(job.topology.hosts),
    }
    entries: list[dict[str, Any]] = [{"name": name, "value": _literal(value)} for name, value in plain.items()]
    label = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    entries.append({"name": "JOBSET_JOB_INDEX", "valueFrom": {"fieldRef": {"fieldPath": label}}})
    for name in job.secrets:
        entries.append({"name": name, "valueFrom": {"secretKeyRef": {"name": f"{job.name}-secrets", "key": name}}})
    return entries


def _literal(text: str) -> str:
    return text.replace("$", "$$")


def secret_manifest(job: Job, values: dict[str, str]) -> dict[str, Any]:
    """The Secret that the pods read; goes to the cluster over standard input and is printed without values."""
    data = {name: base64.b64encode(value.encode()).decode() for name, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": f"{job.name}-secrets"}, "data": data}


def xpk_command(job: Job, values: argparse.Namespace) -> list[str]:
    """The same job through xpk, which makes its own JobSet; TPU only."""
    kind = TPUS.get(job.topology.accelerator)
    if kind is None or not values.cluster:
        raise LaunchError("xpk starts TPU jobs here: give --accelerator and --topology of a TPU, and --cluster")
    if job.secrets:
        raise LaunchError("xpk would write secrets into its command; use `apply`, or secrets that the cluster mounts")
    own = ("mount-bucket", "mount-claim", "service-account", "queue", "pod_patch", "cpu", "memory", "chips")
    dropped = [f"--{name}" for name in own if getattr(values, name.replace("-", "_"))]
    dropped += ["--namespace"] if values.namespace != _NAMESPACE else []
    if dropped:
        raise LaunchError(f"xpk makes its own pods, without {' and '.join(dropped)}: leave that out, or use `apply`")
    check_shared(job, [])  # nothing is mounted there
    cores = chips_of(values.topology) * _TPU_CORES.get(job.topology.accelerator, 1)
    variables = {CODE: commit_digest(job.commit), **job.environment}
    exports = [f"export {name}={shlex.quote(value)};" for name, value in variables.items()]
    return [
        *("xpk", "workload", "create", f"--workload={job.name}", f"--cluster={values.cluster}"),
        *(f"--tpu-type={kind.xpk}-{cores}", f"--num-slices={job.topology.groups}"),
        *(f"--docker-image={values.image}", f"--max-restarts={job.retries}"),
        f"--restart-on-exit-codes={','.join(map(str, [1, *UNCOUNTED]))}",  # all but those above 126 are final to xpk
        f"--termination-grace-period-seconds={job.grace_seconds}",
        f"--command={' '.join([*exports, 'exec', shlex.join(['python', *job.arguments()])])}",
        # Otherwise it starts two containers in a pod of this kind, of which each would be a process of its own.
        *(["--no-use-parallel-containers"] if job.topology.accelerator == "tpu7x" else []),
        *(["--spot"] if values.spot else []),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, join_seconds=6 * 3600)  # pods come as their nodes do
    add = parser.add_argument
    add("action", choices=["apply", "manifest", "delete", "xpk"])
    add(
        "--image",
        required=True,
        help="made from launch/Dockerfile.tpu or launch/Dockerfile.cuda, with the commit in it",
    )
    add("--accelerator", required=True, help=f"{', '.join(TPUS)}, or a GPU as in nvidia-h100-80gb")
    add("--topology", default="", help="TPU: the slice's shape, as in 4x4 or 2x2x4")
    add(
        "--chips",
        type=int,
        default=0,
        help=f"TPU: of a host; 8 for machine types as ct6e-standard-8t. {HOST_CHIPS}, or all of a smaller slice",
    )
    add("--slices", type=int, default=1, help="groups of nodes: TPU slices, or replicas of GPU nodes")
    add("--nodes", type=int, default=1, help="GPU: nodes in a group")
    add("--gpus", type=int, default=8, help="GPU: of a node")
    add("--spot", action="store_true")
    add("--queue", default="", help="local queue of Kueue")
    add("--namespace", default=_NAMESPACE)
    add("--service-account", default="", help="Kubernetes service account, for access to the bucket")
    add("--mount-bucket", default="", help="a bucket to see as /bucket, through Cloud Storage FUSE")
    add("--mount-claim", default="", help="a persistent volume claim to see as /claim")
    add("--cpu", default="", help=f"processors that a pod asks for, as in 100; {_CPU_EACH} an accelerator")
    add("--memory", default="", help=f"memory that a pod asks for, as in 300Gi; {_GIB_EACH}Gi an accelerator")
    add("--pod_patch", default="", metavar="FILE", help="YAML of a pod template, merged into that of the pods")
    add("--cluster", default="", help="xpk: name of the cluster")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    values = _parser().parse_args(own)
    shape = shape_of(values)
    platform = "tpu" if shape.accelerator in TPUS else "cuda"
    job = job_of(values, overrides, shape, copied=values.action != "delete", platform=platform)
    folders = {"/bucket": values.mount_bucket, "/claim": values.mount_claim}
    check_shared(job, [folder for folder, source in folders.items() if source])
    for flag, pattern in (("image", _IMAGE), ("mount_bucket", _BUCKET), ("cpu", _CPU), ("memory", _MEMORY)):
        if getattr(values, flag) and not pattern.fullmatch(getattr(values, flag)):
            raise LaunchError(f"--{flag.replace('_', '-')} is {getattr(values, flag)!r}, which cannot be one")
    if values.action == "delete":
        return _delete(job, values)
    for note in _notes(job, values):
        print(note, file=sys.stderr)
    if values.action == "manifest":
        print(json.dumps(manifest(job, values), indent=2))
        return 0
    if not values.dry_run and not values.no_check:
        check_config(job, devices=devices_of(shape, values))
    return _xpk(job, values) if values.action == "xpk" else _apply(job, values)


def _notes(job: Job, values: argparse.Namespace) -> list[str]:
    """What the cluster does otherwise than one may think."""
    notes = [spot_note(job, f"{SPOT_SECONDS} to 25 s")] if values.spot and job.grace_seconds > SPOT_SECONDS else []
    nodes = job.topology.groups * job.topology.hosts
    if job.topology.accelerator not in TPUS and nodes > 1 and not values.pod_patch:
        notes.append(
            f"# {nodes} GPU NODES WITHOUT --pod_patch: NCCL GOES OVER ONE ORDINARY SOCKET BETWEEN THEM, a small part "
            "of what GPUDirect-TCPX, TCPXO or RDMA give. See docs/launch.md"
        )
    if values.action == "manifest" and job.secrets:
        literals = " ".join(f'--from-literal={name}="${name}"' for name in job.secrets)
        make = shlex.join(_kubectl(values, "create", "secret", "generic", f"{job.name}-secrets"))
        notes.append(f"# the pods read a Secret, which `apply` makes and a manifest alone does not: {make} {literals}")
    return notes


def _apply(job: Job, values: argparse.Namespace) -> int:
    """Hands the job in, unless it is there and runs; one that has ended is begun again."""
    made, apply = manifest(job, values), _kubectl(values, "apply", "-f", "-")
    text, given = json.dumps(made, indent=2), dict.fromkeys(job.secrets, "")
    look = _kubectl(values, "get", "jobset", job.name, "--ignore-not-found", "--output=json")
    delete = _kubectl(values, "delete", "jobset", job.name, "--wait")
    if values.dry_run:
        lines = [printed(apply, json.dumps(secret_manifest(job, given), indent=2))] if job.secrets else []
        lines += [printed(look), f"# if it has completed or failed:\n{printed(delete)}", printed(apply, text)]
        print(job.describe(), *lines, sep="\n\n")
        return 0
    if job.secrets:
        given = secret_values(job)
    found = json.loads(_answer(look) or "null")
    ended = _ended(found) if found else ""
    if found and not ended and _settings(found) != _settings(made):
        raise LaunchError(
            f"{job.name} is there with other settings, which a JobSet cannot take on; say `delete` first, which gives "
            "it time to save, or another --name"
        )
    if job.secrets:
        _answer(apply, json.dumps(secret_manifest(job, given)))
    if ended:
        print(f"{job.name} has {ended.lower()}: starting it again")
        _answer(delete, seconds=SLOW_SECONDS + job.grace_seconds)
    print(_answer(apply, text))
    chosen = f"batch.kubernetes.io/job-completion-index=0,jobset.sigs.k8s.io/jobset-name={job.name}"
    print(shlex.join(_kubectl(values, "logs", "-f", "-l", chosen)))
    return 0


def _settings(jobset: dict[str, Any]) -> str | None:
    return jobset["metadata"].get("annotations", {}).get(SETTINGS)


def _ended(jobset: dict[str, Any]) -> str:
    """How a JobSet has ended, "Completed" or "Failed"; "": it has not."""
    conditions = jobset.get("status", {}).get("conditions") or []
    ends = [each["type"] for each in conditions if each["status"] == "True" and each["type"] in ("Completed", "Failed")]
    return ends[0] if ends else ""


def _delete(job: Job, values: argparse.Namespace) -> int:
    whats = [("jobset", job.name), ("secret", f"{job.name}-secrets")]
    steps = [_kubectl(values, "delete", kind, name, "--ignore-not-found") for kind, name in whats]
    if values.dry_run:
        print(job.describe(), *map(printed, steps), sep="\n\n")
        return 0
    for command in steps:
        print(_answer(command, seconds=SLOW_SECONDS + job.grace_seconds))  # it waits for pods that save
    return 0


def _xpk(job: Job, values: argparse.Namespace) -> int:
    command = xpk_command(job, values)
    if values.dry_run:
        print(job.describe(), printed(command), sep="\n\n")
        return 0
    there(command[0])
    if code := subprocess.run(command).returncode:
        raise LaunchError(f"{' '.join(command[:3])} failed ({code})")
    return 0


def _kubectl(values: argparse.Namespace, *words: str) -> list[str]:
    return ["kubectl", f"--namespace={values.namespace}", *words]


def _answer(command: Sequence[str], given: str | None = None, *, seconds: float = SLOW_SECONDS) -> str:
    """What a command prints. Raises LaunchError: it is not installed, failed, or did not end."""
    done = ask_tool(command, (given or "").encode(), seconds=seconds)
    if done.code:
        raise LaunchError(f"{command[0]} {command[2]} failed ({done.code}): {done.errors.strip() or 'no message'}")
    return done.output.strip()


if __name__ == "__main__":
    run_main(main)
