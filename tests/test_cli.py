"""The command line: what a user types, and the one sentence that answers a mistake."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxlm import cli
from maxlm.chips import CHIPS
from maxlm.cli import main
from maxlm.config import StoreConfig, TokenizerConfig
from maxlm.configfile import source
from maxlm.data.tokenizers import load_tokenizer
from tests.tiny import tiny_config, write_corpus

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
LADDER = str(ROOT / "configs" / "scaling" / "stdlib_ladder.py")


def test_check_prints_what_differs_and_what_follows(capsys, tmp_path):
    figures = tmp_path / "figures.json"
    command = ["check", f"--config={QUICKSTART}", "--config.model.num_layers=7", f"--json={figures}"]
    assert main([*command, "--config.name=8b[/v2]"]) == 0
    out = capsys.readouterr().out
    assert "'8b[/v2]'" in out  # which is no markup
    assert "model.num_layers" in out and "FLOPs" in out
    found = json.loads(figures.read_text())
    assert found["parameters"]["total"] == sum(
        value for name, value in found["parameters"].items() if name not in ("total", "besides embeddings", "active")
    )
    assert found["bytes of state"]["parameters"] == 4 * found["parameters"]["total"]
    assert found["training FLOPs"]["a token, causal-exact"] > found["training FLOPs"]["a token, 6N"]


def test_a_run_takes_the_memory_that_plans_count_with(monkeypatch):
    """JAX takes three quarters of a GPU unless the environment says otherwise, before its devices start."""
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    seen = []

    def note(args):
        seen.append([os.environ.get(name) for name in names])
        return 0

    for command in ("check", "train", "generate", "replay"):
        monkeypatch.setitem(cli._COMMANDS, command, cli._COMMANDS[command]._replace(run=note))
    assert main(["check"]) == main(["train"]) == 0
    assert seen[0] == [None, None]
    chip = CHIPS["h100"]
    assert float(seen[1][0]) == pytest.approx(chip.usable_bytes / chip.hbm_bytes) and seen[1][1] is None
    monkeypatch.setenv(names[0], "0.5")
    main(["generate"])
    monkeypatch.delenv(names[0])
    monkeypatch.setenv(names[1], "0.6")  # JAX refuses both at once
    main(["replay"])
    assert seen[2:] == [["0.5", None], [None, "0.6"]]


def test_check_touches_no_device():
    """With a platform that does not exist, anything that starts JAX's devices fails."""
    environment = {**os.environ, "JAX_PLATFORMS": "nonexistent"}
    command = [sys.executable, "-m", "maxlm.cli", "check", f"--config={QUICKSTART}", "--devices=8"]
    subprocess.run([*command, "--config.data.batch_size=8"], cwd=ROOT, env=environment, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["trian"], "'trian' is not a command"),
        (["check"], "--config is missing"),
        (["check", "--config=nowhere.py"], "nowhere.py"),
        (["check", f"--config={QUICKSTART}:v5p-128"], "takes no word after a colon"),
        (
            ["check", f"--config={ROOT}/configs/llama3_8b.py:v4-8"],
            "configs/llama3_8b.py: this recipe was not tuned for",
        ),
        (["check", f"--config={LADDER}"], f"has no get_config(); a study is planned by `maxlm study plan {LADDER}`"),
        (["check", f"--config={QUICKSTART}", "--config.model.attention.kv_heads=3"], "does not divide"),
        (["check", f"--config={QUICKSTART}", "--devices=7", "--config.parallel.tensor=3"], "does not divide 7 devices"),
        (["check", f"--config={QUICKSTART}", "stray"], "'stray' was not understood"),
        (["generate", "--workdir=nowhere", "--prompt=x"], "holds no model"),
        (["generate", "--prompt=x"], "either --workdir"),
        (["convert", "from-hf", "nowhere"], "OUT is missing"),
        (["convert", "sideways", "a", "b"], "no direction"),
        (["convert", "from-hf", "nowhere", "out", "more"], "'more' was not understood"),
        (["convert", "from-hf", "nowhere", "out"], "no Hugging Face folder"),
        (["convert", "from-hf", "nowhere", "gs://bucket/out"], "gs://bucket/out is no folder of this machine"),
        (["generate", "--workdir=nowhere"], "--prompt is missing"),
        (["generate", "--workdir=x", "--prompt=x", "--top_p=0"], "top_p"),
        (["train", f"--config={QUICKSTART}"], "--workdir is missing"),
    ],
)
def test_mistakes_get_one_sentence(command, expected, capsys):
    assert main(command) in (1, 2)
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.saved=x", "train.saved is not a setting; known here: accumulation, "),
        ("train.remta=full", "train.remta is not a setting; did you mean train.remat?"),
        ("train.remat_names=mlp_up", "train.remat_names is not a setting; did you mean train.remat?"),
        ("train.steps.first=1", "train.steps.first is not a setting; train.steps is one"),
        ("train[3]=1", "train.3 is not a setting"),
        ("train=3", "train is a section; name a setting of it, as in train.steps"),
        ("model.attention=x", "model.attention is a section; name a setting of it, as in model.attention.q_heads"),
        ("data.stores.web.source=text:x", "data.stores.web is not in the config file, which has stdlib"),
        ("data.stores.web.source=text:x", "add stores={'web': StoreConfig(...)} to the file"),
        ("data.stores.stdlib.sorce=text:x", "did you mean data.stores.stdlib.source?"),
        ("data.stores.c4-en.source=text:x", "--config.data.stores['c4-en'].source="),
        ("data.phases.long.from_step=9000", "data.phases.long is not in the config file, which has none"),
        ("train.steps=1e4", "--config.train.steps=1e4: a whole number was expected, as in 10000"),
        ("optim.peak_lr=fast", "--config.optim.peak_lr=fast: a number was expected, as in 3e-4"),
        ("data.mixture=stdlib", "type data.mixture=\"(('stdlib', 1.0),)\""),
        ("data.mask_documents=no", "--config.data.mask_documents=no: true or false was expected"),
    ],
)
def test_an_override_that_cannot_be_followed_is_told_by_its_path(override, expected, capsys):
    assert main(["check", f"--config={QUICKSTART}", f"--config.{override}"]) == 1
    error = capsys.readouterr().err
    assert expected in error and "\\" not in error


def test_all_overrides_that_name_no_setting_are_told_at_once(capsys, tmp_path):
    wrong = ["--noconfig.data.mask_document", "--config.train.stepz", "7"]
    flagfile = tmp_path / "flags"
    flagfile.write_text("--config.optim.peak_lrr=1\n")
    assert main(["check", f"--config={QUICKSTART}", *wrong, f"--flagfile={flagfile}"]) == 1
    error = capsys.readouterr().err
    for setting in ("data.mask_documents", "train.steps", "optim.peak_lr"):
        assert f"did you mean {setting}?" in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config(:\n    pass\n", "own.py cannot be loaded (line 1: SyntaxError: "),
        (
            "from maxlm.config import ModelConfig\n\ndef get_config():\n    return ModelConfig(embed_dims=5)\n",
            "own.py cannot be loaded (line 4: TypeError: ModelConfig.__init__() got an unexpected keyword argument "
            "'embed_dims')",
        ),
        (
            "from maxlm.config import Config\n\ndef get_config():\n    return Config()\n",
            "get_config() of own.py returns a Config; end it with `return as_config_dict(Config(...))`",
        ),
        ("def get_config():\n    return {}\n", "get_config() of own.py returns a dict; end it with"),
        ("def get_config(place):\n    return {}\n", "get_config() of own.py needs a word; type --config=own.py:WORD"),
        (
            "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({})\n",
            "train is not in what get_config() returns",
        ),
    ],
)
def test_a_file_that_gives_no_config_is_told_in_one_sentence(text, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(text)
    assert main(["check", "--config=own.py", "--config.train.steps=7"]) == 1
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert len(error.splitlines()) == 1 + ("problems:" in error)


def test_the_commands_of_a_run(tmp_path, capsys):
    """prepare, tokenizer, train and generate, one after the other, as a user would type them."""
    config = tmp_path / "config.py"
    corpus = write_corpus(tmp_path / "corpus")
    config.write_text(source(tiny_config(corpus, train__steps=6, optim__ema_decay=0.5, parallel__data=8)))
    workdir = f"--workdir={tmp_path / 'run'}"
    assert main(["prepare", f"--config={config}", workdir]) == 0
    assert main(["train", f"--config={config}", workdir]) == 0
    out = capsys.readouterr().out
    assert "compiled the step" in out and "memory a device" in out and "6/6" in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 6

    prompts = ["--prompt=document 1", "--prompt=the cat sees a"]
    assert main(["generate", workdir, *prompts, "--max_tokens=8", "--temperature=0"]) == 0
    both = capsys.readouterr().out
    assert "document 1" in both and "the cat sees a" in both

    # The saved config is one that runs, and says the same run is complete.
    assert main(["train", f"--config={tmp_path / 'run' / 'config.py'}", workdir]) == 0
    assert main(["train", f"--config={config}", workdir, "--config.seed=1"]) == 1
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        (
            {"model__learned_positions": 64, "eval__prompts": ("document 1\n",), "eval__sample_tokens": 60},
            "has 12 tokens and 60 more are asked for, but the model has 64 learned",
        ),
        (
            {"data__stores": {"tiny": 0}, "eval__stores": ("tiny",)},
            "'tiny', which holds no document out; type data.stores.tiny.heldout_permille",
        ),
    ],
)
def test_what_the_end_could_not_do_is_refused_before_training(tmp_path, capsys, leaves, message):
    corpus = write_corpus(tmp_path / "corpus", documents=20)
    if permille := leaves.get("data__stores"):
        sources = {name: StoreConfig(source=f"text:{corpus}/*.txt", heldout_permille=n) for name, n in permille.items()}
        leaves = {**leaves, "data__stores": sources}
    config = tmp_path / "config.py"
    config.write_text(source(tiny_config(corpus, **leaves)))
    assert main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tokenizer_goes_where_it_was_asked_to_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    config, run = tmp_path / "config.py", tmp_path / "run"
    corpus = write_corpus(tmp_path / "corpus", documents=40)
    tokenizer = TokenizerConfig(kind="sentencepiece")
    config.write_text(source(tiny_config(corpus, data__tokenizer=tokenizer, model__vocab_size=320)))
    command = ["tokenizer", f"--config={config}", f"--workdir={run}"]
    for out, message in ((tmp_path / "gone" / "t.model", "in a folder that exists"), (tmp_path, "is a folder")):
        assert main([*command, f"--out={out}"]) == 1
        assert f"{out}" in (error := capsys.readouterr().err) and message in error
    assert not run.exists()  # it was not trained in vain
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*command, "--out=~/t.model"]) == 0
    assert load_tokenizer("sentencepiece", tmp_path / "t.model").vocab_size == 320
    kept = (tmp_path / "t.model").read_bytes()

    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([*command, "--out=~/t.model"]) == 1
    assert "~/t.model cannot be written ([Errno 28] No space left" in capsys.readouterr().err
    assert (tmp_path / "t.model").read_bytes() == kept
