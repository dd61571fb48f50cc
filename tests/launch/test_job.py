"""A job's description, its code, and the pinned packages beside it."""

import importlib
import re
import subprocess
import tomllib

import pytest

from launch import job as jobs
from launch.job import LaunchError, make_job
from tests.launch.common import COMMIT, ROOT

GIVEN = {"name": "run", "config": "configs/quickstart.py", "workdir": "/runs/a"}


def test_every_problem_is_said_at_once():
    with pytest.raises(LaunchError) as error:
        make_job(
            name="Run",
            config="a",
            workdir="ftp://x",
            overrides=("--x=1",),
            environment={"A B": "1", "MY_TOKEN": "1"},
            commit="main",
        )
    assert len(str(error.value).splitlines()) == 6


def test_secrets_are_names_only(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush-hush")
    job = make_job(**GIVEN, secrets=("HF_TOKEN",))
    assert "hush" not in job.describe() + repr(job) and "HF_TOKEN" in job.describe()
    assert jobs.secret_values(job) == {"HF_TOKEN": "hush-hush"}
    with pytest.raises(LaunchError, match="no OTHER"):
        jobs.secret_values(make_job(**GIVEN, secrets=("OTHER",)))


@pytest.mark.parametrize(
    ("name", "secret"),
    [("TOKENIZERS_PARALLELISM", False), ("MAX_TOKENS", False), ("HF_TOKEN", True), ("PGPASSWORD", True)]
    + [("AWS_ACCESS_KEY_ID", True), ("AWS_SECRET_ACCESS_KEY", True), ("WANDB_API_KEY", True), ("OPENAI_APIKEY", True)],
)
def test_what_looks_like_a_secret(name, secret):
    try:
        assert make_job(**GIVEN, environment={name: "x"}) and not secret
    except LaunchError as error:
        assert secret and f"type --secret={name}" in str(error)


@pytest.mark.parametrize(
    ("workdir", "mounts", "good"),
    [
        ("gs://bucket/a", [], True),
        ("runs/a", ["/"], False),
        ("~/a", ["/"], False),
        ("/a", ["/"], True),
        ("/claim/a", ["/bucket", "/claim"], True),
        ("/claims/a", ["/claim"], False),
        ("/claim/../a", ["/claim"], False),
        ("/a", [], False),
    ],
)
def test_a_workdir_that_hosts_do_not_share_is_refused(workdir, mounts, good):
    job = make_job(**{**GIVEN, "workdir": workdir})
    if good:
        return jobs.check_shared(job, mounts)
    with pytest.raises(LaunchError, match="not all hosts see; give .*gs://bucket/folder"):
        jobs.check_shared(job, mounts)


def test_another_job_has_another_digest():
    digests = {make_job(**GIVEN).digest(), make_job(**GIVEN, overrides=("--config.seed=1",)).digest()}
    assert len(digests) == 2 and make_job(**GIVEN).digest() in digests


def test_code_is_that_of_the_commit(tmp_path):
    place = jobs.unpack_code(COMMIT, tmp_path)
    assert (place / "maxlm/cli.py").exists() and not (place / ".git").exists()
    (place / "mark").touch()
    assert jobs.unpack_code(COMMIT, tmp_path) == place and (place / "mark").exists()  # made once
    for revision in ("--help", "no-such"):
        with pytest.raises(LaunchError, match="git rev-parse"):
            jobs.find_commit(revision, config="configs/quickstart.py")


@pytest.mark.parametrize(
    "config", ["configs/llama3_8b.py:v6e-256", "./configs/llama3_8b.py", "configs/../configs/llama3_8b.py:h100x8"]
)
def test_a_recipe_is_named_with_its_place_as_for_train(config):
    """The commit holds the file; the program gets the words as they were typed."""
    values = jobs.job_parser(None).parse_args([f"--commit={COMMIT}", f"--config={config}", "--workdir=/runs/a"])
    job = jobs.job_of(values, (), jobs.Topology())
    assert (job.commit, job.name) == (COMMIT, "llama3-8b") and f"--config={config}" in job.arguments()


@pytest.mark.parametrize("config", ["configs/none.py:v6e-256", "configs", "configs:v6e-256", ":v6e-256", "../x.py"])
def test_a_config_that_the_commit_lacks_is_refused_with_or_without_a_place(config):
    with pytest.raises(LaunchError, match="is not in commit|outside repository"):
        jobs.find_commit(COMMIT, config=config)


def test_how_long_processes_wait_is_said_to_every_launchers_program():
    from launch import gke, hosts, slurm, tpu_vm

    platforms = {
        slurm: (["--time=1", "--folder=/s"], 600),
        gke: (["apply", "--image=x", "--accelerator=v5p"], 21600),
        hosts: (["run", "--hosts=a"], 300),
        tpu_vm: (["run", "--zone=z", "--accelerator=v5p-8"], 300),
    }
    common = ["--config=configs/quickstart.py", "--workdir=/w", f"--commit={COMMIT}"]
    for launcher, (flags, wait) in platforms.items():
        job = jobs.job_of(launcher._parser().parse_args([*flags, *common]), (), jobs.Topology())
        assert job.arguments()[-2:] == [f"--join_seconds={wait}", "--silence_seconds=60"], launcher
        own = ["--join_seconds=7", "--silence_seconds=8"]
        job = jobs.job_of(launcher._parser().parse_args([*flags, *common, *own]), (), jobs.Topology())
        assert job.arguments()[-2:] == own, launcher
    with pytest.raises(LaunchError, match="--silence_seconds is 0; give at least 1"):
        make_job(**GIVEN, silence_seconds=0)


@pytest.mark.parametrize(
    ("launcher", "flags", "devices"),
    [
        ("tpu_vm", ["run", "--zone=z", "--accelerator=v5litepod-16"], 16),
        ("tpu_vm", ["run", "--zone=z", "--accelerator=v5p-64", "--slices=2"], 64),  # two cores a chip, a device
        ("tpu_vm", ["run", "--zone=z", "--accelerator=tpu7x-16"], 16),  # two cores a chip, two devices
        ("tpu_vm", ["run", "--zone=z", "--accelerator=v9-16", "--runtime=x"], None),
        ("gke", ["apply", "--image=x", "--accelerator=v6e", "--topology=2x4", "--chips=8"], 8),
        ("gke", ["apply", "--image=x", "--accelerator=v5p", "--topology=2x2x4", "--slices=2"], 32),
        ("gke", ["apply", "--image=x", "--accelerator=tpu7x", "--topology=2x2x2"], 16),
        ("gke", ["apply", "--image=x", "--accelerator=nvidia-h100-80gb", "--nodes=4", "--gpus=8"], 32),
        ("slurm", ["--time=1", "--folder=/s", "--nodes=2", "--gpus_per_node=4"], 8),
        ("slurm", ["--time=1", "--folder=/s", "--nodes=2"], None),
        ("hosts", ["run", "--processes=2", "--devices=3"], 6),
        ("hosts", ["run", "--processes=2"], None),
        ("hosts", ["run", "--hosts=a,b"], None),
    ],
)
def test_the_check_before_renting_knows_the_devices_that_the_flags_tell(monkeypatch, launcher, flags, devices):
    asked = []

    class Enough(Exception):
        pass

    def check(command, **kwargs):
        asked.append([word for word in command if word.startswith("--devices")])
        raise Enough

    module = importlib.import_module(f"launch.{launcher}")
    monkeypatch.setattr(module, "there", lambda program: None, raising=False)
    common = ["--config=configs/quickstart.py", "--workdir=gs://bucket/run", f"--commit={COMMIT}"]
    git = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: (git if command[0] == "git" else check)(command, **more)
    )
    with pytest.raises(Enough):
        module.main([*flags, *common])
    assert asked == [[f"--devices={devices}"] if devices else []]


# Extras whose absence a config meets with only on the hosts: sources of data, and where metrics go.
EVERYWHERE = ("data", "tfds", "wandb")


@pytest.mark.parametrize("extra", ["cpu", "tpu", "cuda"])
def test_a_lock_has_every_package_in_a_version_that_will_do(extra):
    from packaging.requirements import Requirement

    pinned = dict(
        line.split(" ")[0].split("==") for line in (ROOT / "launch" / f"{extra}.lock").read_text().splitlines()
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *(line for name in (extra, *EVERYWHERE) for line in extras.get(name, []))]:
        wanted = Requirement(line)
        name = re.sub("[-_.]+", "-", wanted.name).lower()
        assert wanted.specifier.contains(pinned[name]), f"{line} is not in launch/{extra}.lock"
    assert pinned["jax"] == pinned["jaxlib"]
    assert {"tpu": "libtpu", "cuda": "jax-cuda13-plugin", "cpu": "jax"}[extra] in pinned
    if extra != "cpu":
        dockerfile = (ROOT / "launch" / f"Dockerfile.{extra}").read_text()
        assert f"launch/{extra}.lock" in dockerfile and re.search(r"^FROM python:3\.11\.\d+-", dockerfile, re.M)


def test_the_image_for_gpus_asks_for_them():
    """Without these variables pyxis and GKE start the container without GPUs, or JAX does not find the driver."""
    text = (ROOT / "launch" / "Dockerfile.cuda").read_text()
    for variable in (
        "NVIDIA_VISIBLE_DEVICES=all",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        "LD_LIBRARY_PATH=/usr/local/nvidia/lib64",
    ):
        assert re.search(rf"^ENV .*\b{variable}( |$)", text, re.M)
