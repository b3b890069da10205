"""EAGER's network: one encoder, two decoders that write two codes of the same item, two tasks that bind them.

Wang et al., "EAGER: Two-Stream Generative Recommender with Behavior-Semantic Collaboration", KDD 2024,
https://arxiv.org/abs/2406.14017: the two-stream generation architecture (L_gen), the global contrastive task
with a summary token (GCT, L_con), the semantic-guided transfer task (SGT, L_recon and L_recog). Training,
answers and all deviations are in `eager.py`.

A stream is TIGER's decoder (`CodeDecoder`) over its own codes: all of a user's targets in one pass, each from
what was strictly before it. The tasks stand apart (`Tasks`): without them every answer is the same.

Letters: B users, L history, D width, S code positions, P positions of a decoder, V codes a level, T targets,
H heads, K keys, C width of a stream's item vectors, M drawn items.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.nn.moments import START, MomentBias, latest
from tiglon.nn.transformer import (
    HIDDEN,
    Attention,
    DecoderLayer,
    Dropout,
    EncoderLayer,
    FeedForward,
    KeysValues,
    Linear,
)
from tiglon.retrieval.repetition import Repetition, Returns
from tiglon.retrieval.tiger_causal import CausalConfig, CodeDecoder, Memory

BEHAVIOUR, SEMANTIC = "behaviour", "semantic"
TEMPERATURE = 0.3  # τ of InfoNCE, the released code's
MASKED = 0.5  # share of the codes that are hidden, and that are replaced


class Stream(CodeDecoder):
    """A decoder over codes of its own; what it reads comes from the encoder that streams share.

    An item enters the encoder by `enter` and the latest state leaves it by `leave`, at first each other's
    inverse and another rotation in each stream, so that both have room in one state.

    taught: how many codes of each position training has; those after them are free for items that arrive later.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        config: CausalConfig,
        codes: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
        content_width: int = 0,
    ) -> None:
        super().__init__(sizes, config, codes, vectors, content_width)
        c, P = config, len(sizes) - self.paired
        self.taught = sizes if codes is None else tuple(int(n) for n in codes.max(axis=0, initial=0) + 1)
        with torch.no_grad():  # a free code says nothing of itself
            for s in range(1, len(sizes)):
                at = self.prefixes.offsets[s]
                self.prefixes.code.weight[at + self.taught[s] : at + sizes[s]] = 0
        self.begin = nn.Parameter(torch.randn(c.width))
        layers = [
            DecoderLayer(c.width, c.heads, c.head_width, c.hidden, c.dropout) for _ in range(c.decoder_layers)
        ]
        self.decoder: Sequence[DecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm_decoder = nn.RMSNorm(c.width, eps=1e-6)
        self.bias_cross = MomentBias(c.heads, c.distances, P)
        self.bias_self = nn.Parameter(torch.zeros(c.heads, P, P))
        self.dropout = Dropout(c.dropout)
        self.enter = Linear(c.width, c.width, 0.0)
        self.leave = Linear(c.width, c.width, 0.0)
        with torch.no_grad():
            nn.init.orthogonal_(self.enter.weight)
            self.leave.weight.copy_(self.enter.weight.T)

    def items(self, embedded: Tensor) -> Tensor:
        """(…, S, D) embedded codes → (…, D) what the items that they stand for say to the encoder."""
        return self.enter(embedded.sum(dim=-2) * len(self.sizes) ** -0.5)

    def memory(self, states_BKD: Tensor, moment_BK: Tensor) -> Memory:
        layers = [layer.cross_attention.keys_values(states_BKD) for layer in self.decoder]
        return Memory(self.leave(states_BKD), layers, moment_BK)

    def logits(self, x_TD: Tensor, before: Tensor) -> Tensor:
        """As `CodeDecoder.logits`; where gradients are wanted each distinct prefix looks its codes up once,
        as all have nearly as many."""
        prefixes, s = self.prefixes, before.shape[1]
        if s == 0 or not len(prefixes.keys[s - 1]) or not torch.is_grad_enabled():
            return super().logits(x_TD, before)
        keys, size = prefixes.keys[s - 1], self.sizes[s]
        V = int((keys % size).max()) + 1  # the codes after those no item has
        row_U, of_T, count_U = prefixes.nodes(before)[:, -1].unique(return_inverse=True, return_counts=True)
        key_UV = row_U[:, None] * size + torch.arange(V)
        at = torch.searchsorted(keys, key_UV).clamp(max=len(keys) - 1)
        row_UV = torch.where(keys[at] == key_UV, prefixes.rows[s - 1][at], 0)
        own = prefixes.code.weight[prefixes.offsets[s] : prefixes.offsets[s] + V]
        vectors_UVD = F.embedding(row_UV, prefixes.vectors()) + own
        order = of_T.argsort(stable=True)
        place_T = torch.empty_like(order)
        place_T[order] = torch.arange(len(order)) - (count_U.cumsum(0) - count_U)[of_T[order]]
        x_UtD = x_TD.new_zeros(len(row_U), int(count_U.max()), x_TD.shape[1]).index_put((of_T, place_T), x_TD)
        logits_TV = (x_UtD @ vectors_UVD.transpose(1, 2))[of_T, place_T].float()
        return F.pad(logits_TV, (0, size - V))

    def code_vectors(self, s: int) -> Tensor:
        """(V, D) of the codes at position s by themselves, whatever stands before them; taught ones alone."""
        if s == 0:
            return self.prefixes.vectors()[1 : 1 + self.taught[0]]
        at = self.prefixes.offsets[s]
        return self.prefixes.code.weight[at : at + self.taught[s]]


class EagerNetwork(nn.Module):
    """The shared encoder and its streams (a dictionary by name); `tasks` only while learning."""

    def __init__(
        self, config: CausalConfig, streams: Mapping[str, Stream], tasks: Tasks | None = None
    ) -> None:
        super().__init__()
        c = config
        self.streams: Mapping[str, Stream] = nn.ModuleDict(streams)  # type: ignore[assignment]
        self.start = nn.Parameter(torch.randn(c.width))  # state of an empty history
        block = (c.width, c.heads, c.head_width, c.hidden, c.dropout)
        layers = [EncoderLayer(*block) for _ in range(c.encoder_layers)]
        self.encoder: Sequence[EncoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(c.width, eps=1e-6)
        self.bias = MomentBias(c.heads, c.distances)
        self.dropout = Dropout(c.dropout)
        self.repetition = Repetition()
        self.tasks = tasks

    def encode(self, embedded: Mapping[str, Tensor], moment_BL: Tensor) -> dict[str, Memory]:
        """What each stream's decoder reads, from the embedded codes (B, L, S, D) of each; padding at PADDING."""
        parts = [stream.items(embedded[name]) for name, stream in self.streams.items()]
        x = torch.stack(parts).sum(dim=0) * len(parts) ** -0.5
        x = self.dropout(torch.cat([self.start.expand(len(x), 1, -1), x], dim=1))
        moment = F.pad(moment_BL, (1, 0), value=START)
        bias = self.bias(moment, moment, own=True)
        for layer in self.encoder:
            x, _ = layer(x, bias)
        x = self.dropout(self.norm(x))
        return {name: stream.memory(x, moment) for name, stream in self.streams.items()}

    def extended(self, codes: Mapping[str, np.ndarray], vectors: Mapping[str, np.ndarray]) -> EagerNetwork:
        """This network, without tasks, where new items (M, S) have prefixes in each stream, and content (M, C)."""
        streams = {
            name: stream.extended(codes[name], vectors.get(name)) for name, stream in self.streams.items()
        }
        new = copy.copy(self)
        new._modules = self._modules | {"streams": nn.ModuleDict(streams), "tasks": None}
        return new

    def losses(
        self,
        codes: Mapping[str, Tensor],
        moment_BL: Tensor,
        target_BL: Tensor,
        allowed: Mapping[str, Sequence[Tensor]],
        returns: Mapping[str, Returns],
        wanted: Mapping[str, Tensor] | None = None,
        drawn: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """(T,) losses of the T targets: one a stream, and "contrast" and "transfer" where there are tasks.

        codes: by stream (B, L, S).   allowed: by stream the codes (T, V) that exist below each target's prefix.
        returns: by stream what came before each target.
        wanted: by stream the frozen vectors (T, C) of the targets.
        drawn: by stream the vectors (M, C) of drawn items, and which are the target itself (T, M).
        """
        embedded = {}
        for name, stream in self.streams.items():
            stream.prefixes.forget()
            embedded[name] = stream.embed(codes[name])
        memories = self.encode(embedded, moment_BL)
        found: dict[str, Tensor] = {}
        summaries: dict[str, Tensor] = {}
        tasks = self.tasks
        row_R = torch.arange(0) if tasks is None else some_rows(len(moment_BL), tasks.share)
        asked = target_BL[row_R]
        for name, stream in self.streams.items():
            known = embedded[name][:, :, :-1]
            states, past = stream.states(memories[name], known, moment_BL)
            given = codes[name][target_BL], allowed[name], returns[name]
            found[name] = stream.losses(states[target_BL], *given).sum(dim=1)
            if tasks is not None:
                some = memories[name].rows(row_R), rows_of(past, row_R, len(moment_BL))
                read = tasks.summaries[name](stream, *some, embedded[name][row_R], moment_BL[row_R])
                summaries[name] = read[asked]
        if tasks is None:
            return found
        chosen_T = torch.zeros(target_BL.shape, dtype=torch.bool).index_fill(0, row_R, True)[target_BL]

        def spread(loss: Tensor) -> Tensor:
            """(T,) with the mean that the losses of the chosen have."""
            whole = loss.new_zeros(len(chosen_T))
            whole[chosen_T] = loss * (len(chosen_T) / max(len(loss), 1))
            return whole

        if tasks.contrast is not None and wanted is not None:
            parts = []
            for name, summary_TD in summaries.items():
                guess_TC = tasks.summaries[name].project(summary_TD).float()
                if tasks.contrast == "smooth-l1":
                    parts.append(smooth_l1(guess_TC, wanted[name][chosen_T]))
                else:
                    assert drawn is not None
                    vectors_MC, same_TM = drawn[name]
                    parts.append(info_nce(guess_TC, wanted[name][chosen_T], vectors_MC, same_TM[chosen_T]))
            found["contrast"] = spread(torch.stack(parts).sum(dim=0))
        if tasks.transfer is not None:
            truth = codes[BEHAVIOUR][row_R][asked]
            guide = summaries[SEMANTIC].detach()  # semantics teach behaviour, not the other way
            found["transfer"] = spread(tasks.transfer.loss(self.streams[BEHAVIOUR], truth, guide))
        return found


class Tasks(nn.Module):
    """What only learning needs: a summary token a stream, and the transfer from semantics to behaviour.

    contrast: how summaries are pulled towards the frozen vectors of the next item, or None.
    share: of the rows of a batch, drawn anew at each step, from which tasks learn; they cost as much as the rest.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        content_widths: Mapping[str, int],
        contrast: Literal["smooth-l1", "info-nce"] | None,
        transfer: bool,
        share: float = 1.0,
    ) -> None:
        super().__init__()
        self.contrast, self.share = contrast, share
        summaries = {name: Summary(stream, content_widths[name]) for name, stream in streams.items()}
        self.summaries: Mapping[str, Summary] = nn.ModuleDict(summaries)  # type: ignore[assignment]
        self.transfer = Transfer(streams[BEHAVIOUR]) if transfer else None


def some_rows(rows: int, share: float) -> Tensor:
    """(R,) a share of the rows, at least one, in their order; all without a draw."""
    if share >= 1:
        return torch.arange(rows)
    return torch.randperm(rows)[: max(1, round(share * rows))].sort().values


def rows_of(past: Sequence[KeysValues], row_R: Tensor, rows: int) -> list[KeysValues]:
    """Of keys and values (B · L, …) those of some of the B rows."""
    return [tuple(x.unflatten(0, (rows, -1))[row_R].flatten(0, 1) for x in pair) for pair in past]


# -- the global contrastive task ---------------------------------------------------------------------


class Summary(nn.Module):
    """A token after the last code, which reads all codes and is read by none."""

    def __init__(self, stream: Stream, content_width: int) -> None:
        super().__init__()
        c = stream.config
        P = stream.bias_self.shape[-1]
        self.token = nn.Parameter(torch.randn(c.width))
        self.bias_self = nn.Parameter(torch.zeros(c.heads, 2, P + 2))
        self.bias_cross = MomentBias(c.heads, c.distances, 2)
        self.project = Linear(c.width, content_width, c.width**-0.5)

    def forward(
        self,
        stream: Stream,
        memory: Memory,
        past: Sequence[KeysValues],
        embedded_BLSD: Tensor,
        moment_BL: Tensor,
    ) -> Tensor:
        """(B, L, D) of L targets: the last code and then the token go through the decoder after `past`.

        The positions that predict codes are done by then, so this cannot move a bit of them.
        """
        now = latest(memory.states_BKD, memory.moment_BK, moment_BL)[:, :, None]
        bias = self.bias_cross(moment_BL, memory.moment_BK, own=False)
        of_last, of_token = bias[:, :, 0::2], bias[:, :, 1::2]
        last = stream.written(embedded_BLSD)[..., -1:, :]
        past = self._after(stream, last + now, memory, of_last, past)
        states, _ = stream.positions(self.token + now, memory, self.bias_self[:, 1:], of_token, past)
        return states[:, :, 0]

    def _after(
        self,
        stream: Stream,
        x_BL1D: Tensor,
        memory: Memory,
        bias_cross: Tensor,
        past: Sequence[KeysValues],
    ) -> list[KeysValues]:
        """`past` and the keys and values of one more input, whose last state nobody reads."""
        B, L, _, D = x_BL1D.shape
        x = stream.dropout(x_BL1D).reshape(B * L, 1, D)
        seen = []
        for i, (layer, kv, (k, v)) in enumerate(
            zip(stream.decoder, memory.layers, past, strict=True), start=1
        ):
            if i < len(stream.decoder):
                x, now = layer.over_codes(x, self.bias_self[:, :1, :-1], (k, v))
                x = layer.over_history(x.reshape(B, L, D), kv, bias_cross).reshape(B * L, 1, D)
            else:
                more_k, more_v = layer.self_attention.keys_values(layer.norm_self(x))
                now = torch.cat([k, more_k], dim=2), torch.cat([v, more_v], dim=2)
            seen.append(now)
        return seen


def smooth_l1(guess_TC: Tensor, wanted_TC: Tensor) -> Tensor:
    """(T,) L_con with the paper's distance, a mean over C; what is wanted has entries of about unit size."""
    return F.smooth_l1_loss(guess_TC, wanted_TC, reduction="none").mean(dim=-1)


def info_nce(guess_TC: Tensor, wanted_TC: Tensor, drawn_MC: Tensor, same_TM: Tensor) -> Tensor:
    """(T,) −log of the target's share among drawn items, by cosine / τ; `same` are the target itself."""
    guess, wanted, drawn = (F.normalize(x, dim=-1) for x in (guess_TC, wanted_TC, drawn_MC))
    right = (guess * wanted).sum(dim=-1, keepdim=True)
    others = (guess @ drawn.T).masked_fill(same_TM, HIDDEN)
    return -(torch.cat([right, others], dim=1) / TEMPERATURE).log_softmax(dim=1)[:, 0]


# -- the semantic-guided transfer task ---------------------------------------------------------------


class Transfer(nn.Module):
    """A bidirectional decoder: [CLS] and behaviour codes read the semantic summary of the same item.

    What it passes on to the streams are better vectors of behaviour codes: those it reads and writes are
    theirs. Codes stand for themselves here, without their prefix, which would tell what is hidden.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        c, S = stream.config, len(stream.sizes)
        self.width = c.width
        self.cls = nn.Parameter(torch.randn(c.width))
        self.hidden = nn.Parameter(torch.randn(c.width))
        self.place = nn.Parameter(torch.zeros(S, c.width))
        self.bias_self = nn.Parameter(torch.zeros(c.heads, S + 1, S + 1))
        inner = c.heads * c.head_width
        self.norm_attention = nn.RMSNorm(c.width, eps=1e-6)
        self.attention = Attention(c.width, c.heads, c.head_width)
        self.value = Linear(c.width, inner, c.width**-0.5)
        self.out = Linear(inner, c.width, inner**-0.5)
        self.norm_ff = nn.RMSNorm(c.width, eps=1e-6)
        self.ff = FeedForward(c.width, c.hidden, c.dropout)
        self.dropout = Dropout(c.dropout)
        self.norm = nn.RMSNorm(c.width, eps=1e-6)
        self.recognise = Linear(c.width, 1, c.width**-0.5)

    def forward(self, x_TSD: Tensor, guide_TD: Tensor, asked: slice = slice(None)) -> Tensor:
        """(T, |asked|, D) states at some positions of [CLS] and the S inputs; each sees all S + 1."""
        x = torch.cat([self.cls.expand(len(x_TSD), 1, -1), x_TSD + self.place], dim=1)
        normed = self.norm_attention(x)
        kv, bias = self.attention.keys_values(normed), self.bias_self[:, asked]
        x = x[:, asked] + self.dropout(self.attention(normed[:, asked], kv, bias))
        guide = self.out(self.value(guide_TD))  # attention to one key is its value
        x = x + self.dropout(guide[:, None].expand(x.shape))
        return self.norm(x + self.dropout(self.ff(self.norm_ff(x))))

    def loss(self, stream: Stream, codes_TS: Tensor, guide_TD: Tensor) -> Tensor:
        """(T,) L_recon + L_recog: hidden codes are rebuilt; true codes are told from partly replaced ones."""
        vectors = [stream.code_vectors(s) for s in range(len(stream.sizes))]

        def read(codes: Tensor) -> Tensor:
            rows = [F.embedding(codes[:, s], table) for s, table in enumerate(vectors)]
            return torch.stack(rows, dim=1) * self.width**0.5

        hide_TS = torch.rand(codes_TS.shape) < MASKED
        true = read(codes_TS)
        covered = torch.where(hide_TS[..., None], self.hidden, true)
        states = self(covered, guide_TD, asked=slice(1, None))
        rebuilt = torch.zeros(len(codes_TS))
        for s, table in enumerate(vectors):
            logits_TV = (states[:, s] @ table.T).float()
            missed = F.cross_entropy(logits_TV, codes_TS[:, s], reduction="none")
            rebuilt = rebuilt + missed * hide_TS[:, s]
        both = torch.cat([true, read(replaced(codes_TS, stream.taught))])
        states = self(both, guide_TD.repeat(2, 1), asked=slice(0, 1))
        is_true, is_false = self.recognise(states[:, 0]).float()[:, 0].chunk(2)
        return rebuilt + F.softplus(-is_true) + F.softplus(is_false)


def replaced(codes_TS: Tensor, sizes: Sequence[int]) -> Tensor:
    """Codes of which each is another with probability one half, and at least one is where a level has two."""
    size = torch.tensor(sizes)
    could = (size > 1).float()
    swap = (torch.rand(codes_TS.shape) < MASKED) & (size > 1)
    if could.any():
        one = torch.multinomial(could, len(codes_TS), replacement=True)
        swap |= F.one_hot(one, len(sizes)).bool() & ~swap.any(dim=1, keepdim=True)
    step = 1 + (torch.rand(codes_TS.shape) * (size - 1)).long().clamp(max=(size - 2).clamp(min=0))
    return torch.where(swap, (codes_TS + step) % size, codes_TS)
