"""The end of a run: the last checkpoint and evaluation, samples, and the report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from maxlm.data.prepare import heldout_documents
from maxlm.errors import UserError
from maxlm.eval.baselines import Baselines, Text, compression_baselines
from maxlm.infer.generate import RunnableModel, check_prompts, encode_prompts, generate_text
from maxlm.infer.load import generation_runtime
from maxlm.infer.sampling import Sampling
from maxlm.model.flops import ledger as flop_ledger
from maxlm.train.outlook import heaviest
from maxlm.train.report import Facts, Foretold, Sample, write_report

if TYPE_CHECKING:
    from maxlm.config import Config
    from maxlm.data.prepare import Prepared
    from maxlm.train.loop import Run
    from maxlm.train.state import TrainState


def finish(run: Run, state: TrainState) -> None:
    """Saves, evaluates on every held-out document, samples, and writes report.md and report.json.

    The state is whole on the disk before anything else: what follows is compiled here for the first time, takes long,
    and can be done again by the same command.

    Raises:
      Leaving: a signal came. Once the compressors run it is not waited for any more: the report is seconds away.
    """
    step = run.config.train.steps
    run.save(state, step)
    run.settle_save(state, step)
    if run.copies:
        run.copies.remove()
    run.heed(step)
    held_out = run.evaluate(state, step)
    if not run.config.eval.documents:  # else it is no score beside those of fewer documents
        run.score(step, held_out)
    run.put_down(step, held_out)
    run.heed(step)
    with run.goodput.bucket("evaluation"):
        samples = draw_samples(run, state)
    run.heed(step)
    if jax.process_index() == 0:
        with run.goodput.bucket("evaluation"):
            baselines = measure_baselines(run, tuple(held_out))
        run.flush()
        write_report(run.workdir, facts(run, samples, baselines))
        run.log(f"report: {run.home.place}/report.md")


def check_finish(config: Config, data: Prepared) -> None:
    """Looks, before anything is trained, at what the end of the run will ask for.

    Raises:
      UserError: a store of eval.stores holds nothing out, or the config's prompts cannot be continued.
    """
    for name in config.eval.stores:
        if not data.stores[name].split("heldout").num_documents:
            raise UserError(
                f"eval.stores names {name!r}, which holds no document out; type data.stores.{name}.heldout_permille=10 "
                "or more, or leave it out of eval.stores"
            )
    if prompts := config.eval.prompts:
        check_prompts(encode_prompts(data.tokenizer, prompts), config.eval.sample_tokens, model=config.model)


def draw_samples(run: Run, state: TrainState) -> list[Sample]:
    """Continues the config's prompts, with the parameters where they are; [] where that fails, which the log tells.

    By then all that the run was for is done: a report without samples is better than none.
    """
    prompts, again = run.config.eval.prompts, f"maxlm generate --workdir={run.home.place} draws some"
    if not prompts:
        return []
    if jax.process_count() > 1:
        run.log(f"the report has no samples: a run of several processes draws none; {again}")
        return []
    config, setup = run.config, run.setup
    model = RunnableModel(
        config.model,
        setup.parts.graphdef,
        state.evaluated(),
        generation_runtime(setup.mesh, jnp.dtype(config.train.precision)),
    )
    try:
        texts = generate_text(
            model,
            encode_prompts(run.data.tokenizer, prompts),
            tokenizer=run.data.tokenizer,
            max_new_tokens=config.eval.sample_tokens,
            sampling=Sampling(temperature=0.8),
            key=jax.random.key(config.seed),
        )
    except Exception as error:  # whatever it is, the report does not hang on samples
        said = str(error).strip().partition("\n")[0]  # an allocator goes on for pages
        run.log(f"the report has no samples: {type(error).__name__}: {said}; {again}")
        return []
    return [Sample(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def measure_baselines(run: Run, stores: tuple[str, ...]) -> Baselines | None:
    """What general compressors make of the held-out documents."""
    if not stores:
        return None
    chosen = [run.data.stores[name] for name in stores]
    return compression_baselines([Text(heldout_documents(store), store.split("heldout").num_bytes) for store in chosen])


def facts(run: Run, samples: list[Sample], baselines: Baselines | None) -> Facts:
    """What the report says beyond metrics.jsonl."""
    model, data = run.config.model, run.config.data
    counts = flop_ledger(model, sequence_length=data.sequence_length)
    judged = heaviest(run.config)
    return Facts(
        name=run.config.name,
        parameters=counts.params_total,
        model={
            "parameters": counts.params_total,
            "parameters besides embeddings": counts.params_nonembedding,
            "layers": model.num_layers,
            "embed dim": model.embed_dim,
            "heads": f"{model.attention.q_heads} query, {model.attention.kv_heads} key-value",
            "vocabulary": model.vocab_size,
            "batch": f"{data.batch_size} rows of {data.sequence_length} tokens",
            "optimizer": f"{run.config.optim.optimizer}, peak learning rate {run.config.optim.peak_lr:g}",
            "precision": run.config.train.precision,
        },
        baselines=baselines,
        samples=samples,
        goodput=run.goodput.summary(),
        train_command=f"maxlm train --config={run.workdir}/config.py --workdir={run.home.place}",
        generate_command=f"maxlm generate --workdir={run.home.place} --prompt='...'",
        foretold=foretold(run),
        foretold_steps=range(judged.from_step + 1, judged.from_step + judged.steps + 1),
        extra=data_figures(run),
    )


def foretold(run: Run) -> Foretold | None:
    """What a plan that lies in the workdir said of this run: `maxlm plan --json=WORKDIR/plan.json`.

    None where there is none, and, with a line in the log, where it cannot be read or is for another number of devices
    than the run's mesh has.
    """
    devices = run.setup.mesh.size
    try:
        plan = json.loads((run.workdir / "plan.json").read_text())
        seconds, held = float(plan["forecast"]["seconds"]), float(plan["memory"]["total"])
        hardware, planned, phase = str(plan["topology"]), int(plan["devices"]), plan.get("phase", "")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        run.log(
            f"plan.json is no plan that can be read ({type(error).__name__}: {error}): the report has no forecast; "
            "write it with maxlm plan --json"
        )
        return None
    if planned != devices:
        run.log(
            f"plan.json is for {planned} device{'s' if planned != 1 else ''}, and the run has {devices}: the report "
            "has no forecast; plan for hardware of as many"
        )
        return None
    return Foretold(
        hardware=f"{hardware} ({phase})" if phase else hardware,
        seconds=seconds,
        device_bytes=held,
        device_bytes_held=run.device_bytes,
    )


def data_figures(run: Run) -> dict[str, float]:
    """How often each store was read, and how full its rows were in the last phase."""
    total = run.config.train.steps
    epochs = {f"epochs_{name}": count for name, count in run.loader.epochs(total).items()}
    return epochs | {f"fill_{name}": share for name, share in run.loader.fill(total).items()}
