"""The manifests of three topologies against the published schemas, and words that must stay words."""

import json
from pathlib import Path

import pytest

from launch import gke
from launch.job import EXIT_PREEMPTED, LaunchError
from tests.launch.common import COMMIT

HOSTILE = "/run/a b'c\"d$(id)`id`$HOME"
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


def test_leaving_to_be_restarted_is_told_from_failing(capsys):
    found = made(capsys, TOPOLOGIES["tpu slice"][0], "--retries=7", "--grace_seconds=123")
    spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [EXIT_PREEMPTED]
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accelerator=v5p", "--topology=2by2"], "the slice's shape"),
        (["--accelerator=v5e", "--topology=3x3"], "9 chips"),
        (["--accelerator=h100"], "nvidia-h100-80gb"),
        (["--accelerator=v5p", "--topology=2x2x1", "--mount-bucket=a,b"], "cannot be one"),
        (["--accelerator=v5p", "--topology=2x2x1", "--env=HF_TOKEN=1"], "--secret=HF_TOKEN"),
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
