"""`maxlm <command>`: reads the command line, calls the part that does the work, and turns errors into one sentence."""

from __future__ import annotations

import faulthandler
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags
from rich.console import Console
from rich.table import Table

from maxlm.allocator import use_huge_pages
from maxlm.chips import GPU_SHARE
from maxlm.config import Config
from maxlm.configflag import define_config, read_flags
from maxlm.errors import UserError
from maxlm.files import asked_file, check_asked, write_asked
from maxlm.resolve import differences, resolve

_ON_DEVICES = ("train", "generate", "replay")  # commands that compute on accelerators, where there are some


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code of the process."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(importlib.metadata.version("maxlm"))
        return 0
    command = _COMMANDS.get(args[0])
    if command is None:
        print(f"maxlm: {args[0]!r} is not a command; known: {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    if args[0] in _ON_DEVICES:
        _take_gpu_memory()
    if argv is None and args[0] in ("plan", "train"):  # plans for CPUs are of the time that a run takes
        use_huge_pages()
        faulthandler.enable()  # a process that dies in C++ says where its threads were
    flags.FLAGS.mark_as_parsed()  # libraries below read absl's global flags, which this program does not use
    try:
        return command.run([f"maxlm {args[0]}", *args[1:]])
    except _expected_errors() as error:
        print(f"maxlm {args[0]}: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 1


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is written for the user; any other keeps its traceback."""
    return (UserError, flags.Error)


# --- flags -----------------------------------------------------------------------------------------------------------


def _flags(args: list[str], *, config: bool) -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "show this text", short_name="h", flag_values=values)
    if config:
        define_config(values, args)
    return values


def _parse(
    values: flags.FlagValues, args: list[str], *, required: tuple[str, ...] = (), words: tuple[str, ...] = ()
) -> list[str]:
    """Parses; with --help, prints how the command is typed and ends the process.

    Args:
      required: flags that have to be given.
      words: names of the arguments that are no flags, all of which have to be given; they are returned.
    """
    values.set_gnu_getopt(True)
    rest = read_flags(values, args)
    missing = [name for name in required if not values.help and not values[name].value]
    if values.help:
        print(_help(values, args[0].split()[-1]))
        raise SystemExit(0)
    if len(rest) - 1 > len(words):
        raise UserError(f"{rest[len(words) + 1]!r} was not understood; flags are written as --name=value")
    if len(rest) - 1 < len(words):
        raise UserError(f"{words[len(rest) - 1]} is missing; type: {' '.join([args[0], *words])}")
    if missing:
        raise UserError(f"--{missing[0]} is missing; see `maxlm {args[0].split()[-1]} --help`")
    return rest[1:]


def _usage() -> str:
    """All commands, a line each."""
    width = max(len(command.words) for command in _COMMANDS.values())
    lines = [f"  {name:10} {command.words:{width}}  {command.does}" for name, command in _COMMANDS.items()]
    end = "`maxlm <command> --help` lists the command's flags, `maxlm --version` says which MaxLM this is."
    return "\n".join(["usage: maxlm <command> [flags]", "", *lines, "", end])


def _help(values: flags.FlagValues, name: str) -> str:
    """How a command is typed, and its own flags: not those that absl and a config's settings add."""
    command = _COMMANDS[name]
    lines = [f"usage: maxlm {name} {command.words}", "", command.does, ""]
    for own in sorted(own for own in values if "." not in own and own not in ("h", "flagfile", "undefok")):
        flag = values[own]
        default = "" if flag.default in (None, [], False) else f" (default: {flag.default})"
        lines += [f"  --{own}" + ("" if flag.boolean else "=VALUE"), f"      {flag.help}{default}"]
    if "config" in values:
        lines += ["  --config.section.key=VALUE", "      one setting of the config; maxlm/config.py lists them all"]
    return "\n".join(lines)


# --- commands --------------------------------------------------------------------------------------------------------


def _train(args: list[str]) -> int:
    from maxlm.train.signals import leaving

    with leaving():  # from the first moment on: importing JAX and finding the others takes its time
        return _train_now(args)


def _train_now(args: list[str]) -> int:
    from maxlm.heartbeat import SILENCE_SECONDS
    from maxlm.rollcall import JOIN_SECONDS, run_facts

    values = _flags(args, config=True)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of process 0, for a run of several", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many processes make up the run", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("process", None, "number of this one, from 0 on", flag_values=values, lower_bound=0)
    for name, seconds, what in (
        ("join_seconds", JOIN_SECONDS, "how long to wait for the others"),
        ("silence_seconds", SILENCE_SECONDS, "after how long without a sign one is lost"),
    ):
        flags.DEFINE_float(name, seconds, what, flag_values=values, lower_bound=1.0)
    _parse(values, args, required=("config", "workdir"))
    config = resolve(values.config)
    from maxlm.cluster import join
    from maxlm.train.run import train  # JAX starts here, after the config is known to be sound

    joined = join(
        run_facts(config),
        coordinator=values.coordinator,
        processes=values.processes,
        process=values.process,
        timeout=values.join_seconds,
        silence=values.silence_seconds,
        log=_log,
    )
    place, heart = values.workdir, joined.heartbeat
    return joined.run(lambda: _in_memory(config, lambda: train(config, place, log=_log, heartbeat=heart)))


def _in_memory(config: Config, run: Callable[[], int]) -> int:
    """The run; where memory is short, the error says what would fit. The training loop knows nothing of plans."""
    try:
        return run()
    except Exception as error:  # an allocation that fails comes as JAX's error or XLA's; all others go on as they are
        from maxlm.plan.shortage import explained, is_shortage

        if not is_shortage(error):
            raise
        raise explained(error, config) from error


def _replay(args: list[str]) -> int:
    values = _flags(args, config=False)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("step", None, "the step, as in metrics.jsonl", flag_values=values, lower_bound=1)
    flags.DEFINE_string("json", None, "also write what was found to this file", flag_values=values)
    _parse(values, args, required=("workdir", "step"))
    check_asked(values.json)
    from maxlm.train.metrics import plain
    from maxlm.train.progress import plain_console
    from maxlm.train.replay import replay, table

    found = replay(values.workdir, values.step, log=_log)
    write_asked(values.json, json.dumps(plain(found._asdict()), indent=1) + "\n")
    plain_console().print(table(found))
    print(f"{found.verdict}: {found.why}")
    return 0


def _take_gpu_memory() -> None:
    """Has JAX take as much of a GPU's memory as plans count with, unless the environment says how much."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not any(os.environ.get(name) for name in names):
        os.environ[names[-1]] = str(GPU_SHARE)


def _check(args: list[str]) -> int:
    values = _flags(args, config=True)
    flags.DEFINE_integer("devices", None, "devices that the mesh has to fit", flag_values=values)
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=values)
    _parse(values, args, required=("config",))
    config = resolve(values.config, devices=values.devices)
    from maxlm.train.outlook import outlook
    from maxlm.train.progress import plain_console

    figures = outlook(config)
    write_asked(values.json, json.dumps(figures, indent=2) + "\n")
    console = plain_console()
    _print_differences(console, config)
    for title, rows in figures.items():
        table = Table("", title, box=None, title_justify="left", pad_edge=False)
        for name, value in rows.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
        console.print(table, "")
    return 0


def _print_differences(console: Console, config: Config) -> None:
    table = Table("setting", "default", "here", box=None, pad_edge=False)
    for path, (default, value) in differences(config).items():
        table.add_row(path, repr(default), repr(value))
    console.print(table, "")


def _plan(args: list[str]) -> int:
    from maxlm.plan import commands

    values = _flags(args, config=True)
    commands.define_flags(values)
    _parse(values, args, required=("config", "topology"))
    return commands.plan(values, log=_log)


def _explain(args: list[str]) -> int:
    from maxlm.plan import commands

    values = _flags(args, config=True)
    commands.define_hardware(values)
    _parse(values, args, required=("config", "topology"))
    return commands.explain(values, log=_log)


def _prepare(args: list[str]) -> int:
    values = _flags(args, config=True)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    _parse(values, args, required=("config", "workdir"))
    config = resolve(values.config)
    from maxlm.data.prepare import prepare_data
    from maxlm.train.home import beside

    with beside(values.workdir, log=_log, writes=True) as home:
        prepared = prepare_data(config, home.folder, home=home.place)
    for name, store in prepared.stores.items():
        print(f"{name}: {store.place} ({store.fingerprint[:16]})")
    return 0


def _tokenizer(args: list[str]) -> int:
    values = _flags(args, config=True)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("out", None, "the model file to write", flag_values=values)
    _parse(values, args, required=("config", "workdir", "out"))
    config = resolve(values.config)
    check_asked(values.out)
    from maxlm.data.prepare import prepare_tokenizer
    from maxlm.train.home import Home

    tokenizer = prepare_tokenizer(config, Home(values.workdir, log=_log).place)
    with asked_file(values.out) as out:
        tokenizer.save(out)
    print(f"{values.out}: {tokenizer.vocab_size} pieces ({tokenizer.fingerprint[:16]})")
    return 0


def _generate(args: list[str]) -> int:
    values = _flags(args, config=False)
    flags.DEFINE_string("workdir", None, "folder of a run", flag_values=values)
    flags.DEFINE_string("model", None, "Hugging Face folder, converted model or run", flag_values=values)
    flags.DEFINE_multi_string("prompt", None, "text to continue; may be given several times", flag_values=values)
    flags.DEFINE_bool("chat", False, "apply the chat template that came with the weights", flag_values=values)
    flags.DEFINE_integer("max_tokens", 200, "tokens to add at most", flag_values=values, lower_bound=1)
    flags.DEFINE_multi_string("stop", [], "text that ends a continuation", flag_values=values)
    flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token", flag_values=values, lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "sample among the k likeliest; 0: all", flag_values=values, lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "sample among the likeliest of this mass", flag_values=values, upper_bound=1.0)
    flags.DEFINE_float("min_p", 0.0, "drop tokens below this share of the likeliest", flag_values=values, lower_bound=0)
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1: tokens of the text are less likely", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the sampling", flag_values=values)
    _parse(values, args, required=("prompt",))
    if bool(values.workdir) == bool(values.model):
        raise UserError(
            "give either --workdir (of a run) or --model (a Hugging Face folder, a converted model or a run)"
        )
    from maxlm.infer.load import Asked, generate_from
    from maxlm.infer.sampling import Sampling
    from maxlm.train.home import copied

    asked = Asked(
        prompts=values.prompt,
        max_tokens=values.max_tokens,
        sampling=Sampling(
            temperature=values.temperature,
            top_k=values.top_k,
            top_p=values.top_p,
            min_p=values.min_p,
            repetition_penalty=values.repetition_penalty,
        ),
        seed=values.seed,
        stop=values.stop,
        chat=values.chat,
    )

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    generate_from(
        copied(values.workdir or values.model, log=tell),
        asked,
        log=tell,
        write=lambda text: print(text, end="", flush=True),
    )
    return 0


def _convert(args: list[str]) -> int:
    values = _flags(args, config=False)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16", "float16"], "of what is written; that of the source", flag_values=values
    )
    flags.DEFINE_integer(
        "pad_vocab", 1, "from-hf: pad the vocabulary to a multiple of this", flag_values=values, lower_bound=1
    )
    flags.DEFINE_string("family", None, "to-hf: name of the model family, where it is not known", flag_values=values)
    flags.DEFINE_integer("step", None, "to-hf: the checkpoint to write; the newest", flag_values=values)
    flags.DEFINE_float("shard_gb", 5.0, "to-hf: gigabytes a file at most", flag_values=values, lower_bound=0.001)
    direction, source, out = _parse(values, args, words=("from-hf|to-hf", "SOURCE", "OUT"))
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing here is for an accelerator, which another program may be using
    from maxlm.convert.engine import from_hf, to_hf
    from maxlm.storage import is_bucket
    from maxlm.train.home import copied

    if is_bucket(out):
        raise UserError(f"{out} is no folder of this machine, and weights are written to one: give its path as OUT")
    paths = copied(source, log=_log, step=values.step), Path(out).expanduser().absolute()
    if direction == "from-hf":
        from_hf(*paths, dtype=values.dtype, pad_vocab=values.pad_vocab, log=_log)
    elif direction == "to-hf":
        shard_bytes = int(values.shard_gb * 1e9)
        to_hf(*paths, dtype=values.dtype, family=values.family, step=values.step, shard_bytes=shard_bytes, log=_log)
    else:
        raise UserError(f"{direction!r} is no direction; type from-hf or to-hf")
    return 0


def _study(args: list[str]) -> int:
    from maxlm.study import commands

    values = _flags(args, config=False)
    commands.define_flags(values)
    verb, path = _parse(values, args, words=("plan|run|fit|predict|judge|report", "STUDY.py"))
    return commands.main(verb, path, values, log=_log)


def _log(line: str) -> None:
    print(line, flush=True)


class _Command(NamedTuple):
    """run: takes the words of the command line, the command's own name first. words: how it is typed."""

    run: Callable[[list[str]], int]
    words: str
    does: str


_COMMANDS = {
    "train": _Command(
        _train, "--config=FILE --workdir=DIR [--config.section.key=VALUE ...]", "train, or continue, a run"
    ),
    "check": _Command(_check, "--config=FILE [--devices=N]", "resolve a config; say what follows from it"),
    "plan": _Command(
        _plan,
        "--config=FILE --topology=v5p-128 [--search] [--html=PATH]",
        "memory, traffic, time and cost of a run, before it",
    ),
    "explain": _Command(_explain, "--config=FILE --topology=v5p-128", "which device holds what"),
    "prepare": _Command(_prepare, "--config=FILE --workdir=DIR", "make the tokenizer and the token stores"),
    "tokenizer": _Command(
        _tokenizer, "--config=FILE --workdir=DIR --out=FILE", "train a tokenizer on a config's sources"
    ),
    "convert": _Command(
        _convert, "from-hf FOLDER OUT | to-hf CHECKPOINT OUT [--dtype=...]", "weights from and to Hugging Face"
    ),
    "generate": _Command(
        _generate, "--workdir=DIR | --model=PATH --prompt=TEXT [--chat]", "sample from a run or any weights"
    ),
    "replay": _Command(_replay, "--workdir=DIR --step=N", "a past step again, twice: what was at fault"),
    "study": _Command(
        _study, "plan|run|fit|predict|judge|report STUDY.py [--dir=DIR]", "many small runs, and what they foretell"
    ),
}

if __name__ == "__main__":
    sys.exit(main())
