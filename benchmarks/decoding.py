"""Decoding speed against Hugging Face's `generate`, with the same weights and the same ranked lists.

    python benchmarks/decoding.py [--items 10000] [--beams 20 50] [--users 1 32] [--repeats 7] [--json FILE]

Theirs: T5ForConditionalGeneration.generate, float32, with a prefix function over a Python trie.
Ours: `PaperTiger` with the same weights, and `CausalTiger` at its default size, over the array trie. Each
figure is the median of repeats that take turns, encoding of the histories included. The lists of the first
two are compared item by item. Needs transformers (the extra `dev`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import machine, machine_line
from transformers import T5Config, T5ForConditionalGeneration
from trie import random_ids

from tiglon.retrieval.beam import beam_search
from tiglon.retrieval.tiger_causal import CausalTiger
from tiglon.retrieval.tiger_paper import PaperConfig, PaperTiger
from tiglon.semantic_ids.trie import Trie

SIZES = (256, 256, 256, 256)
HISTORY = 20  # items


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--beams", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--users", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine_line())

    random = np.random.default_rng(0)
    codes = random_ids(options.items, random)
    trie = Trie.build(codes, SIZES)
    torch.manual_seed(0)
    paper, causal = PaperTiger(SIZES).eval(), CausalTiger(SIZES, None, codes).eval()
    with torch.no_grad():  # at zero, where they begin, these would not be exercised
        causal.prefixes.own.weight[1:].normal_(std=causal.config.width**-0.5)
    t5 = t5_of(paper)
    children, item_of = python_trie(codes)

    print(f"{options.items:,} items, {HISTORY} items of history, median of {options.repeats}")
    print(
        f"{'users':>5} {'beams':>5} {'HF generate':>12} {'same weights':>20} {'CausalTiger':>20}  same lists"
    )
    rows = []
    for users in options.users:
        history = torch.from_numpy(codes[random.integers(0, len(codes), (users, HISTORY))].astype(np.int64))
        for beams in options.beams:
            runs: list[Callable[[], np.ndarray]] = [
                partial(theirs, t5, (history + paper.offsets).flatten(1), beams, children, item_of),
                partial(ours, paper, history, beams, trie),
                partial(ours, causal, history, beams, trie),
            ]
            wall, cpu, lists = in_turns(runs, options.repeats)
            agree = float((lists[0] == lists[1]).mean())
            rows.append({"users": users, "beams": beams, "seconds": wall, "cpu_seconds": cpu, "same": agree})
            cells = [f"{s * 1e3:8.1f} ms {wall[0] / s:5.1f} ×" for s in wall[1:]]
            print(
                f"{users:>5} {beams:>5} {wall[0] * 1e3:>9.1f} ms {cells[0]:>20} {cells[1]:>20}  {agree:.2%}"
                f"   (of CPU time: {cpu[0] / cpu[1]:.1f} ×, {cpu[0] / cpu[2]:.1f} ×)",
                flush=True,
            )
    if options.json:
        columns = ["HF generate", "PaperTiger, same weights", "CausalTiger"]
        report = {"machine": machine(), "items": options.items, "columns": columns, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1))


def theirs(
    t5: T5ForConditionalGeneration,
    tokens: torch.Tensor,
    beams: int,
    children: dict[tuple[int, ...], list[int]],
    item_of: dict[tuple[int, ...], int],
) -> np.ndarray:
    """Items (B, beams) by `generate`."""
    out = t5.generate(
        input_ids=tokens,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=len(SIZES),
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=lambda _, row: children[tuple(row[1:].tolist())],
    )
    return np.array([item_of[tuple(row[1:].tolist())] for row in out]).reshape(len(tokens), beams)


@torch.inference_mode()
def ours(network: PaperTiger | CausalTiger, history: torch.Tensor, beams: int, trie: Trie) -> np.ndarray:
    """Items (B, beams) by `beam_search`."""
    users = len(history)
    moment = torch.arange(HISTORY).expand(users, -1)
    step = network.decoder_for(network.encode(history, moment), torch.full((users,), HISTORY))
    return beam_search(step, trie, users, beams, width=beams, renormalise=False).item


def in_turns(
    runs: list[Callable[[], np.ndarray]], repeats: int
) -> tuple[list[float], list[float], list[np.ndarray]]:
    """Median wall-clock and CPU seconds of each, and what each returned, after one run that is not counted.

    On a busy machine the ratio of CPU times says more than that of the clock.
    """
    results = [run() for run in runs]
    taken = np.empty((repeats, len(runs), 2))
    for repeat in taken:
        for run, times in zip(runs, repeat, strict=True):
            start = time.perf_counter(), time.process_time()
            run()
            times[:] = time.perf_counter() - start[0], time.process_time() - start[1]
    wall, cpu = np.median(taken, axis=0).T.tolist()
    return wall, cpu, results


def python_trie(codes: np.ndarray) -> tuple[dict[tuple[int, ...], list[int]], dict[tuple[int, ...], int]]:
    """Prefix → the tokens that may follow, and token row → item, as a prefix function needs them."""
    offsets = 1 + np.concatenate([[0], np.cumsum(SIZES[:-1])])
    children: dict[tuple[int, ...], set[int]] = {}
    item_of = {}
    for item, row in enumerate((codes + offsets).tolist()):
        item_of[tuple(row)] = item
        for depth, token in enumerate(row):
            children.setdefault(tuple(row[:depth]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}, item_of


def t5_of(model: PaperTiger, dropout: float = 0.0) -> T5ForConditionalGeneration:
    """A T5 with the sizes and the weights of `model`."""
    c: PaperConfig = model.config
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(model.token.weight),
            d_model=c.width,
            d_kv=c.head_width,
            d_ff=c.hidden,
            num_layers=c.encoder_layers,
            num_decoder_layers=c.decoder_layers,
            num_heads=c.heads,
            dropout_rate=dropout,
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=model.separator,  # never written
        )
    )
    weights = {"shared.weight": model.token.weight}
    for side, layers, norm, bias in (
        ("encoder", model.encoder, model.norm_encoder, model.bias_encoder),
        ("decoder", model.decoder, model.norm_decoder, model.bias_decoder),
    ):
        weights[f"{side}.final_layer_norm.weight"] = norm.weight
        weights[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias.weight
        for number, layer in enumerate(layers):
            steps = (
                [("SelfAttention", layer.norm_attention, layer.attention)]
                if side == "encoder"
                else [
                    ("SelfAttention", layer.norm_self, layer.self_attention),
                    ("EncDecAttention", layer.norm_cross, layer.cross_attention),
                ]
            )
            block = f"{side}.block.{number}.layer"
            for at, (name, before, attention) in enumerate(steps):
                key, value = attention.kv.weight.T.chunk(2)
                parts = {"q": attention.q.weight.T, "k": key, "v": value, "o": attention.o.weight.T}
                weights |= {f"{block}.{at}.{name}.{part}.weight": w for part, w in parts.items()}
                weights[f"{block}.{at}.layer_norm.weight"] = before.weight
            weights[f"{block}.{len(steps)}.layer_norm.weight"] = layer.norm_ff.weight
            weights[f"{block}.{len(steps)}.DenseReluDense.wi.weight"] = layer.ff.wi.weight.T
            weights[f"{block}.{len(steps)}.DenseReluDense.wo.weight"] = layer.ff.wo.weight.T
    unknown = t5.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    return t5.eval()


if __name__ == "__main__":
    main()
