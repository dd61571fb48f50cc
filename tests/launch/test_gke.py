"""The manifests of three topologies against the published schemas, and words that must stay words."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from launch import gke
from launch.job import EXIT_PREEMPTED, Answer, LaunchError
from tests.launch.common import COMMIT

HOSTILE = "/claim/a b'c\"d$(id)`id`$HOME"
COMMON = ["--config=configs/quickstart.py", "--image=reg/maxlm:1", f"--commit={COMMIT}", "--name=run"]
TOPOLOGIES = {
    "tpu slice": (["--accelerator=v5p", "--topology=2x2x4", "--spot"], 1, 4, {"google.com/tpu": "4"}),
    "tpu slices": (["--accelerator=v5e", "--topology=4x4", "--slices=3", "--queue=q"], 3, 4, {"google.com/tpu": "4"}),
    "gpus": (
        ["--accelerator=nvidia-h100-80gb", "--nodes=4", "--gpus=8", "--mount-bucket=my-bucket", "--mount-claim=c"],
        1,
        4,
        {"nvidia.com/gpu": "8"},
    ),
}


def made(capsys, flags, *more):
    gke.main(["manifest", *COMMON, "--workdir=gs://bucket/run", *flags, *more])
    return json.loads(capsys.readouterr().out)


def pod_of(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_manifest_follows_the_schemas(name, capsys):
    validate = pytest.importorskip("kubernetes_validate").validate
    jsonschema = pytest.importorskip("jsonschema")
    flags, replicas, hosts, devices = TOPOLOGIES[name]
    found = made(capsys, flags, "--secret=WANDB_API_KEY", "--env=XLA_FLAGS=--a=1 --b=2")
    schema = json.loads((Path(__file__).parent / "jobset.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(found)
    (jobs,) = found["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": jobs["template"]["spec"]}
    validate(job, "1.31", strict=True)
    secret = gke.secret_manifest(gke.job_of(*parsed(flags)), {"WANDB_API_KEY": "x"})
    validate(secret, "1.31", strict=True)
    with pytest.raises(Exception, match="tolerationz"):  # the schemas do refuse what they do not know
        validate({**job, "spec": {**job["spec"], "tolerationz": []}}, "1.31", strict=True)
    assert (jobs["replicas"], jobs["template"]["spec"]["completions"]) == (replicas, hosts)
    assert pod_of(found)["containers"][0]["resources"]["limits"] == devices


def parsed(flags):
    values = gke._parser().parse_args(["manifest", *COMMON, "--workdir=gs://bucket/run", *flags])
    return values, (), gke.shape_of(values)


def test_what_a_pod_finds_is_what_detection_reads(capsys):
    from maxlm.cluster import detect

    found = made(capsys, ["--accelerator=nvidia-h100-80gb", "--nodes=2", "--slices=2"])
    environment = {entry["name"]: entry.get("value", "") for entry in pod_of(found)["containers"][0]["env"]}
    environment |= {"JOBSET_JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "1"}  # as the platform fills them in
    cluster = detect(environment, coordinator=None, processes=None, process=None)
    assert cluster is not None and cluster[1:] == ("run-workers-0-0.run:8476", 4, 3)


def test_a_recipe_takes_its_place_along(capsys):
    found = made(capsys, TOPOLOGIES["tpu slice"][0], "--config=configs/llama3_8b.py:v6e-256")
    assert "--config=configs/llama3_8b.py:v6e-256" in pod_of(found)["containers"][0]["command"]


def test_leaving_to_be_restarted_is_told_from_failing(capsys):
    found = made(capsys, TOPOLOGIES["tpu slice"][0], "--retries=7", "--grace_seconds=123")
    spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [68, 69, EXIT_PREEMPTED]  # in order, as Kubernetes wants them
    assert rules[1]["onPodConditions"][0]["type"] == "DisruptionTarget"
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    pod = pod_of(found)
    assert pod["terminationGracePeriodSeconds"] == 123 and pod["restartPolicy"] == "Never"
    assert "kill -TERM 1" in pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]


def test_hostile_words_reach_the_program_as_they_are(capsys):
    gke.main(
        [
            "manifest",
            *COMMON,
            "--accelerator=v5p",
            "--topology=2x2x1",
            "--mount-claim=c",
            f"--workdir={HOSTILE}",
            f"--config.name={HOSTILE}",
            f"--env=A={HOSTILE}",
        ]
    )
    container = pod_of(json.loads(capsys.readouterr().out))["containers"][0]

    def expanded(word):  # as Kubernetes does it: $$ is a dollar, $(NAME) a variable
        assert "$(" not in word.replace("$$", "")
        return word.replace("$$", "$")

    words = [expanded(word) for word in container["command"]]
    assert words[0] == "python" and f"--workdir={HOSTILE}" in words and f"--config.name={HOSTILE}" in words
    assert expanded(next(entry["value"] for entry in container["env"] if entry["name"] == "A")) == HOSTILE


def test_secrets_are_named_and_never_printed(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    flags = [*COMMON, "--workdir=gs://bucket/run", "--accelerator=v5p", "--topology=2x2x1", "--secret=WANDB_API_KEY"]
    gke.main(["apply", *flags, "--dry-run"])
    text = capsys.readouterr().out
    assert "WANDB_API_KEY" in text and "hush" not in text and "aHVzaC1odXNo" not in text
    gke.main(["manifest", *flags, "--namespace=n"])
    out, note = capsys.readouterr()
    assert json.loads(out)["kind"] == "JobSet"  # alone; what it refers to has to be made
    assert (
        'kubectl --namespace=n create secret generic run-secrets --from-literal=WANDB_API_KEY="$WANDB_API_KEY"' in note
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accelerator=v5p", "--topology=2by2"], "the slice's shape"),
        (["--accelerator=v5e", "--topology=3x3"], "9 chips"),
        (["--accelerator=h100"], "nvidia-h100-80gb"),
        (["--accelerator=v5p", "--topology=2x2x1", "--mount-bucket=a,b"], "cannot be one"),
        (["--accelerator=v5p", "--topology=2x2x1", "--env=HF_TOKEN=1"], "--secret=HF_TOKEN"),
        (["--accelerator=v5p", "--topology=2x2x1", "--workdir=/run"], "not all hosts see; give gs://"),
        (["--accelerator=v5p", "--topology=2x2x1", "--workdir=/r", "--mount-claim=c"], "an absolute path below /claim"),
        (["--accelerator=v5p", "--topology=2x2x1", "--workdir=/bucket/r", "--mount-claim=c"], "below /claim"),
        (["--accelerator=v5p", "--topology=2x2x1", "--slices=2"], "slices of several hosts only"),
        (["--accelerator=v6e", "--topology=2x4", "--chips=8", "--slices=2"], "slices of several hosts only"),
        (["--accelerator=v6e", "--topology=4x4", "--chips=8"], "slices of one such host"),
        (["--accelerator=v5e", "--topology=4x4", "--chips=1"], "slices of one such host"),
        (["--accelerator=v5p", "--topology=2x2x2", "--chips=8"], "hosts of v5p have 4"),
        (["--accelerator=v5p", "--topology=2x2x1", "--memory=lots"], "--memory is 'lots'"),
        (["--accelerator=v5p", "--topology=2x2x1", "--pod_patch=/no/such"], "cannot be read: .*No such file"),
    ],
)
def test_what_cannot_be_is_refused(flags, message):
    with pytest.raises(LaunchError, match=message):
        gke.main(["manifest", *COMMON, "--workdir=gs://bucket/run", *flags])


def test_xpk_gets_the_same_job(capsys):
    flags = ["--accelerator=v5p", "--topology=2x2x4", "--slices=2", "--cluster=c", "--dry-run"]
    gke.main(["xpk", *COMMON, "--workdir=gs://bucket/run", *flags])
    text = capsys.readouterr().out
    assert "--tpu-type=v5p-32" in text and "--num-slices=2" in text and "maxlm.cli train" in text
    assert "--restart-on-exit-codes=1,68,69,75" in text and "export JAX_PLATFORMS=tpu,cpu;" in text
    gke.main(["xpk", *COMMON, "--workdir=gs://bucket/run", "--accelerator=tpu7x", "--topology=4x4x4", *flags[3:]])
    assert "--no-use-parallel-containers" not in text
    text = capsys.readouterr().out
    assert "--tpu-type=tpu7x-128" in text and "--no-use-parallel-containers" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mount-bucket=b1b", "--workdir=/bucket/run"], "without --mount-bucket: leave that out"),
        (["--namespace=n", "--queue=q", "--service-account=s"], "--service-account and --queue and --namespace"),
        (["--pod_patch=f"], "without --pod_patch"),
    ],
)
def test_what_xpk_would_drop_is_refused(flags, message):
    given = ["--accelerator=v5p", "--topology=2x2x4", "--cluster=c", "--workdir=gs://bucket/run", "--dry-run"]
    with pytest.raises(LaunchError, match=message):
        gke.main(["xpk", *COMMON, *given, *flags])


@pytest.mark.parametrize(
    ("flags", "hosts", "chips"),
    [
        (["--accelerator=v6e", "--topology=2x4"], 2, 4),
        (["--accelerator=v6e", "--topology=2x4", "--chips=8"], 1, 8),
        (["--accelerator=v5e", "--topology=1x1"], 1, 1),
        (["--accelerator=tpu7x", "--topology=2x2x2"], 2, 4),
    ],
)
def test_hosts_have_the_chips_of_their_machine_type(flags, hosts, chips, capsys):
    found = made(capsys, flags)
    assert found["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == hosts
    assert pod_of(found)["containers"][0]["resources"]["limits"] == {"google.com/tpu": str(chips)}


def test_pods_ask_for_processors_and_memory(capsys):
    flags = TOPOLOGIES["tpu slice"][0]
    asked = pod_of(made(capsys, flags))["containers"][0]["resources"]["requests"]
    assert asked == {"google.com/tpu": "4", "cpu": "8", "memory": "32Gi"}  # none: Kubernetes puts such pods out first
    asked = pod_of(made(capsys, flags, "--cpu=100", "--memory=300Gi"))["containers"][0]["resources"]["requests"]
    assert asked == {"google.com/tpu": "4", "cpu": "100", "memory": "300Gi"}


PATCH = """
metadata:
  annotations: {networking.gke.io/default-interface: eth0}
spec:
  hostNetwork: true
  containers:
  - name: maxlm
    env:
    - {name: NCCL_SOCKET_IFNAME, value: "eth1,eth2"}
    - {name: PYTHONUNBUFFERED, value: "0"}
    resources: {requests: {memory: 1Ti}}
    volumeMounts:
    - {name: libraries, mountPath: /usr/local/nvidia}
  initContainers:
  - {name: daemon, image: daemon:1, restartPolicy: Always}
  tolerations:
  - {key: mine, operator: Exists}
  volumes:
  - {name: libraries, hostPath: {path: /home/kubernetes/bin/nvidia}}
"""


def test_a_pod_patch_is_merged_and_the_manifest_still_follows_the_schemas(tmp_path, capsys):
    (tmp_path / "patch.yaml").write_text(PATCH)
    flags = [*TOPOLOGIES["gpus"][0], f"--pod_patch={tmp_path / 'patch.yaml'}"]
    plain, found = made(capsys, flags[:-1]), made(capsys, flags)
    template = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {
        "gke-gcsfuse/volumes": "true",
        "networking.gke.io/default-interface": "eth0",
    }
    pod, (container,) = template["spec"], template["spec"]["containers"]
    (before,) = pod_of(plain)["containers"]
    assert pod["hostNetwork"] and [each["name"] for each in pod["initContainers"]] == ["daemon"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    was = {entry["name"]: entry.get("value") for entry in before["env"]}
    assert environment == was | {"NCCL_SOCKET_IFNAME": "eth1,eth2", "PYTHONUNBUFFERED": "0"}
    assert container["command"] == before["command"] and container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert container["resources"]["requests"]["memory"] == "1Ti"
    paths = [each["mountPath"] for each in container["volumeMounts"]]
    assert paths == ["/dev/shm", "/bucket", "/claim", "/usr/local/nvidia"]
    assert [each["name"] for each in pod["volumes"]] == ["shm", "bucket", "claim", "libraries"]
    assert [each["key"] for each in pod["tolerations"]] == ["nvidia.com/gpu", "mine"]
    assert found["metadata"]["annotations"] != plain["metadata"]["annotations"]  # `apply` sees that it is another
    validate = pytest.importorskip("kubernetes_validate").validate
    (jobs,) = found["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": jobs["template"]["spec"]}
    validate(job, "1.31", strict=True)


def test_a_pod_patch_of_something_else_is_refused(tmp_path):
    (tmp_path / "patch.yaml").write_text("containers: []\n")
    flags = [*TOPOLOGIES["gpus"][0], f"--pod_patch={tmp_path / 'patch.yaml'}", "--workdir=gs://bucket/run"]
    with pytest.raises(LaunchError, match="has containers at its top; give metadata: and spec:"):
        gke.main(["manifest", *COMMON, *flags])


def test_what_the_cluster_does_otherwise_is_said(tmp_path, capsys):
    (tmp_path / "patch.yaml").write_text(PATCH)
    common = ["apply", *COMMON, "--workdir=gs://bucket/run", "--dry-run"]
    gpus = [*TOPOLOGIES["gpus"][0][:2], "--gpus=8"]

    def said(*flags):
        gke.main([*common, *flags])
        return capsys.readouterr().err

    assert "4 GPU NODES WITHOUT --pod_patch: NCCL GOES OVER ONE ORDINARY SOCKET" in said(*gpus)
    assert said(*gpus, f"--pod_patch={tmp_path / 'patch.yaml'}") == said(*gpus[:1], "--nodes=1") == ""
    assert "of the 300 s of --grace_seconds a preempted process gets 15 to 25 s" in said(*TOPOLOGIES["tpu slice"][0])
    assert said(*TOPOLOGIES["tpu slices"][0]) == ""


KUBECTL = """#!/bin/bash
# Keeps one JobSet, in $KUBE; refuses changes of it as the controller's webhook does.
echo "$*" >> "$KUBE/calls"
case "$*" in
  *"get jobset run --ignore-not-found"*) cat "$KUBE/run" 2> /dev/null || true ;;
  *"apply -f -"*)
    cat > "$KUBE/new"
    grep -q '"kind": "Secret"' "$KUBE/new" && exit 0
    if [ -e "$KUBE/run" ]; then
      cmp -s "$KUBE/new" "$KUBE/spec" && echo unchanged && exit 0
      echo "field is immutable" >&2; exit 1
    fi
    cp "$KUBE/new" "$KUBE/run"; cp "$KUBE/new" "$KUBE/spec"; echo created ;;
  *"delete jobset run"*) rm "$KUBE/run" ;;
  *) exit 9 ;;
esac
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").write_text(KUBECTL)
    (tmp_path / "bin" / "kubectl").chmod(0o755)
    monkeypatch.setenv("KUBE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def test_apply_says_what_is_there_and_begins_again_what_has_ended(cluster, capsys):
    apply = ["apply", *COMMON, *TOPOLOGIES["tpu slice"][0], "--workdir=gs://bucket/run", "--no-check", "--namespace=n"]
    assert gke.main(apply) == 0
    out = capsys.readouterr().out
    assert "created" in out and "kubectl --namespace=n logs -f -l batch" in out
    assert gke.main(apply) == 0 and "unchanged" in capsys.readouterr().out
    with pytest.raises(LaunchError, match="other settings.*say `delete` first"):
        gke.main([*apply, "--config.seed=2"])
    assert gke.main([*apply[:-1], "--namespace=m", "--retries=3"]) == 0  # another way to say the same
    for end in ("Failed", "Completed"):
        found = json.loads((cluster / "run").read_text())
        found["status"] = {"conditions": [{"type": end, "status": "True"}]}
        (cluster / "run").write_text(json.dumps(found))
        assert gke.main([*apply, "--config.seed=2"]) == 0
        out = capsys.readouterr().out
        assert f"run has {end.lower()}: starting it again" in out and "created" in out
        assert "status" not in json.loads((cluster / "run").read_text())
    assert sum("delete" in line for line in (cluster / "calls").read_text().splitlines()) == 2


def test_deleting_waits_as_long_as_pods_may_save(monkeypatch):
    limits = []

    def noted(command, given=b"", *, seconds):
        limits.append((command[2], seconds))
        return Answer(0, "", "")

    monkeypatch.setattr(gke, "ask_tool", noted)
    job = [*COMMON, *TOPOLOGIES["tpu slice"][0], "--workdir=gs://bucket/run", "--grace_seconds=3600"]
    assert gke.main(["delete", *job]) == 0
    assert limits == [("delete", 5400.0)] * 2


def test_an_image_of_other_code_is_noticed(capsys):
    """The pods compare their code with that of the commit which was asked for."""
    from launch.job import unpack_code
    from maxlm.rollcall import tree_digest

    found = made(capsys, TOPOLOGIES["gpus"][0])
    environment = {entry["name"]: entry.get("value", "") for entry in pod_of(found)["containers"][0]["env"]}
    assert environment["JAX_PLATFORMS"] == "cuda,cpu"
    with tempfile.TemporaryDirectory() as folder:
        assert environment["MAXLM_CODE"] == tree_digest(unpack_code(COMMIT, Path(folder)))


def test_pods_wait_long_for_nodes_and_slices_have_their_node_pools(capsys):
    for name, (flags, *_) in TOPOLOGIES.items():
        found = made(capsys, flags)
        assert "--join_seconds=21600" in pod_of(found)["containers"][0]["command"]
        annotations = found["metadata"]["annotations"]
        assert ("alpha.jobset.sigs.k8s.io/exclusive-topology" in annotations) == (name != "gpus")
