"""Compares our logits with those of `transformers`, both in float32 on the CPU, for the model in a folder.

python tools/check_parity.py PATH [--against=FOLDER] [--prompt=TEXT ...] [--long=256] [--tolerance=1e-3] [--json=FILE]

PATH is a Hugging Face folder, or a converted model or a run, which is then held `--against` a Hugging Face folder.
Prompts are random tokens of several lengths, and the texts that are given. Each goes through `transformers` by itself,
whole, and through ours in four ways: by itself, as a row of a batch that is padded, packed with the others into one
row, and with the others through the cache: a prefill, then token by token. Where rotary frequencies hang on the length
of the longest row, prompts have to lie on one side of the original length. Needs `pip install -e '.[parity]'`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOP = 5  # tokens whose agreement is counted besides the likeliest


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two sets of logits (N, V) are apart.

    kl: Kullback-Leibler divergence of ours from theirs, nats a position. top1, top5: share of positions with the same
    likeliest token, and share of the five likeliest that both have.
    """

    positions: int
    max_difference: float
    mean_kl: float
    max_kl: float
    top1: float
    top5: float


def agreement(theirs: np.ndarray, ours: np.ndarray) -> Agreement:
    """Compares logits (N, V), row by row."""
    wide, other = theirs.astype(np.float64), ours.astype(np.float64)
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (wide, other))
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    best, mine = (np.argsort(-x, axis=-1, kind="stable")[:, :TOP] for x in (wide, other))
    shared = [len(set(a) & set(b)) / len(a) for a, b in zip(best.tolist(), mine.tolist(), strict=True)]
    return Agreement(
        positions=len(wide),
        max_difference=float(np.abs(wide - other).max()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1=float((best[:, 0] == mine[:, 0]).mean()),
        top5=float(np.mean(shared)),
    )


class Ours:
    """Our model's logits of token lists, each (tokens, V), in every way that they can come about."""

    def __init__(self, path: Path):
        import jax
        import jax.numpy as jnp

        from maxlm.infer.load import load_model
        from maxlm.model.decoder import Cache, DecodeOut, init_cache, merge

        device = jax.local_devices(backend="cpu")[0]
        self.model = load_model(path, dtype="float32", log=lambda _: None, devices=[device])
        model = self.model

        @jax.jit
        def whole(params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
            decoder = merge(model.graphdef, params)
            out = decoder.hidden(tokens, positions_BS=positions, segments_BS=segments, runtime=model.runtime)
            return decoder.logits(out.hidden_BSD)

        @jax.jit
        def step(params: Any, tokens: Any, cache: Cache) -> Any:
            decoder = merge(model.graphdef, params)
            out: DecodeOut = decoder.decode(tokens, cache=cache, runtime=model.runtime)
            return decoder.logits(out.hidden), out.cache

        def empty(capacity: int, padding: np.ndarray) -> Cache:
            rows = len(padding)
            return init_cache(model.config, rows, capacity=capacity, dtype=jnp.float32, padding=jnp.asarray(padding))

        self._whole, self._step, self._empty = whole, step, empty

    def alone(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Each prompt is a batch by itself."""
        longest = max(map(len, prompts))  # rows of one length, so that one program does for all
        return [self._rows([prompt], longest)[0] for prompt in prompts]

    def padded(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """All prompts are rows of one batch, padded on the right."""
        return self._rows(prompts, max(map(len, prompts)))

    def packed(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """All prompts lie one after the other in one row, as documents that do not see each other."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])[None]
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
        segments = np.repeat(np.arange(1, len(prompts) + 1, dtype=np.int32), lengths)[None]
        logits = np.asarray(self._whole(self.model.params, tokens, positions, segments))[0]
        return np.split(logits, np.cumsum(lengths)[:-1])

    def cached(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """All prompts as rows that are padded on the left: half of the columns as a prefill, the rest one by one."""
        longest = max(map(len, prompts))
        padding = np.array([longest - len(prompt) for prompt in prompts], np.int32)
        tokens = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, padding[row] :] = prompt
        cache, parts = self._empty(longest, padding), []
        half = max(1, longest // 2)
        for columns in np.split(tokens, range(half, longest), axis=1):
            logits, cache = self._step(self.model.params, columns, cache)
            parts.append(np.asarray(logits))
        logits = np.concatenate(parts, axis=1)
        return [logits[row, pad:] for row, pad in enumerate(padding)]

    def _rows(self, prompts: Sequence[Sequence[int]], length: int) -> list[np.ndarray]:
        tokens = np.zeros((len(prompts), length), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = np.array([[len(prompt)] for prompt in prompts])
        places = np.arange(length)[None]
        positions = np.minimum(places, lengths - 1).astype(np.int32)
        segments = (places < lengths).astype(np.int32)
        logits = np.asarray(self._whole(self.model.params, tokens, positions, segments))
        return [logits[row, : len(prompt)] for row, prompt in enumerate(prompts)]


def theirs(folder: Path) -> Callable[[Sequence[int]], np.ndarray]:
    """Token list -> logits (tokens, V) of the peer."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()

    def logits(prompt: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([list(prompt)])).logits[0].numpy()

    return logits


def compare(path: Path, peer: Path, prompts: Sequence[Sequence[int]]) -> dict[str, Agreement]:
    """The agreement over all positions of all prompts, for each way of ours."""
    reference = theirs(peer)
    expected = [reference(prompt) for prompt in prompts]
    ours = Ours(path)
    found = {}
    for name, way in (("alone", ours.alone), ("padded", ours.padded), ("packed", ours.packed), ("cached", ours.cached)):
        got = way(prompts)
        # A padded vocabulary has more logits than the peer's, of rows that no token uses.
        wide = [ours_one[:, : one.shape[1]] for one, ours_one in zip(expected, got, strict=True)]
        found[name] = agreement(np.concatenate(expected), np.concatenate(wide))
    return found


def random_prompts(vocab_size: int, *, longest: int) -> list[list[int]]:
    """Token lists of lengths from 1 to `longest`."""
    draws = np.random.default_rng(0)
    return [draws.integers(0, vocab_size, n).tolist() for n in sorted({1, 7, max(1, longest // 4), longest})]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if any difference is above the tolerance."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="Hugging Face folder, converted model or run")
    parser.add_argument("--against", type=Path, help="Hugging Face folder; that of PATH where it is one")
    parser.add_argument("--prompt", action="append", default=[], help="a text to compare on besides")
    parser.add_argument("--long", type=int, default=256, help="tokens of the longest random prompt")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of logits that passes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    asked = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from maxlm.convert import model_config
    from maxlm.convert.folder import is_huggingface_folder
    from maxlm.errors import UserError
    from maxlm.infer.pretrained import PretrainedText

    peer = asked.against or asked.path
    try:
        if not is_huggingface_folder(peer):
            raise UserError(f"{peer} is no Hugging Face folder; give one to compare with: --against=FOLDER")
        prompts = random_prompts(model_config(peer).vocab_size, longest=asked.long)
        if asked.prompt:
            text = PretrainedText(peer)
            prompts += [text.encode(prompt) for prompt in asked.prompt]
        found = compare(asked.path, peer, prompts)
    except (UserError, ImportError) as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 1
    print(f"{'':8} {'positions':>9} {'max diff':>10} {'mean KL':>10} {'max KL':>10} {'top 1':>8} {'top 5':>8}")
    for name, a in found.items():
        print(
            f"{name:8} {a.positions:9} {a.max_difference:10.2e} {a.mean_kl:10.2e} {a.max_kl:10.2e} "
            f"{a.top1:8.2%} {a.top5:8.2%}"
        )
    if asked.json:
        asked.json.write_text(json.dumps({name: dataclasses.asdict(a) for name, a in found.items()}, indent=1))
    worst = float(np.max([a.max_difference for a in found.values()]))  # NaN, wherever there is one
    print(f"the largest difference is {worst:.2e}; {asked.tolerance:g} is allowed")
    return int(not worst <= asked.tolerance)


if __name__ == "__main__":
    sys.exit(main())
