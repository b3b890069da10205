"""EAGER's network: one encoder, two decoders that write two codes of the same item, two tasks that bind them.

Wang et al., "EAGER: Two-Stream Generative Recommender with Behavior-Semantic Collaboration", KDD 2024,
https://arxiv.org/abs/2406.14017: the two-stream generation architecture (L_gen), the global contrastive task
with a summary token (GCT, L_con), the semantic-guided transfer task (SGT, L_recon and L_recog). Training,
answers and all deviations are in `eager.py`.

A stream is the decoder of `CausalTiger` over its own codes: all of a user's targets in one pass, each from
what was strictly before it. The tasks stand apart (`Tasks`): without them every answer is the same.

Letters: B users, L history, D width, S code positions, P positions of a decoder, V codes a level, T targets,
H heads, K keys, C width of a stream's item vectors, M drawn items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.nn.moments import START, MomentBias, latest
from tiglon.nn.transformer import HIDDEN, DecoderLayer, Dropout, EncoderLayer, KeysValues, Linear
from tiglon.retrieval.tiger_causal import CausalConfig, CausalTiger, Memory

BEHAVIOUR, SEMANTIC = "behaviour", "semantic"
TEMPERATURE = 0.3  # τ of InfoNCE, the released code's
MASKED = 0.5  # share of the codes that are hidden, and that are replaced


class Stream(CausalTiger):
    """The half of `CausalTiger` that writes codes; what it reads comes from the encoder that streams share.

    An item enters the encoder by `enter` and the latest state leaves it by `leave`, at first each other's
    inverse and another rotation in each stream, so that both have room in one state.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        config: CausalConfig,
        codes: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
        content_width: int = 0,
    ) -> None:
        super().__init__(sizes, replace(config, encoder_layers=0), codes, vectors, content_width)
        del self.start, self.norm_encoder, self.bias_encoder  # the encoder's
        self.enter = Linear(config.width, config.width, 0.0)
        self.leave = Linear(config.width, config.width, 0.0)
        with torch.no_grad():
            nn.init.orthogonal_(self.enter.weight)
            self.leave.weight.copy_(self.enter.weight.T)

    def items(self, codes: Tensor) -> Tensor:
        """(…, S) codes → (…, D) what the items that they stand for say to the encoder."""
        return self.enter(self.embed(codes).sum(dim=-2) * len(self.sizes) ** -0.5)

    def memory(self, states_BKD: Tensor, moment_BK: Tensor) -> Memory:
        layers = [layer.cross_attention.keys_values(states_BKD) for layer in self.decoder]
        return Memory(self.leave(states_BKD), layers, moment_BK)

    def states(self, memory: Memory, codes_BLS: Tensor, moment_BL: Tensor) -> tuple[Tensor, list[KeysValues]]:
        """(B, L, P, D) states at the P positions of L targets a user, and their keys and values by layer."""
        known = self.written(codes_BLS[..., :-1])
        begin = self.begin.expand(*codes_BLS.shape[:2], 1, -1)
        P = known.shape[2] + 1
        bias_self = self.bias_self.masked_fill(torch.ones(P, P, dtype=torch.bool).triu(1), HIDDEN)
        bias_cross = self.bias_cross(moment_BL, memory.moment_BK, own=False)
        x = torch.cat([begin, known], dim=2)
        return self.positions(x, memory, moment_BL, bias_self, bias_cross, [None] * len(self.decoder))

    def positions(
        self,
        x_BLPD: Tensor,
        memory: Memory,
        moment_BL: Tensor,
        bias_self: Tensor,
        bias_cross: Tensor,
        past: Sequence[KeysValues | None],
    ) -> tuple[Tensor, list[KeysValues]]:
        """The decoder over inputs (B, L, P, D) that follow those of `past`: states, and all keys and values."""
        B, L, P, _ = x_BLPD.shape
        x = self.dropout(x_BLPD + latest(memory.states_BKD, memory.moment_BK, moment_BL)[:, :, None])
        seen = []
        for layer, kv, before in zip(self.decoder, memory.layers, past, strict=True):
            x, now = layer.over_codes(x.reshape(B * L, P, -1), bias_self, before)
            x = layer.over_history(x.reshape(B, L * P, -1), kv, bias_cross)
            seen.append(now)
        return self.dropout(self.norm_decoder(x)).reshape(B, L, P, -1), seen

    def log_loss(self, states_TPD: Tensor, codes_TS: Tensor, allowed: Sequence[Tensor]) -> Tensor:
        """(T,) L_gen, −log p(item): over the codes (T, V) that exist below the prefix at each position."""
        loss = states_TPD.new_zeros(len(codes_TS), dtype=torch.float32)
        for s, mask in enumerate(allowed):
            logits_TV = self.logits(states_TPD[:, self.position(s)], codes_TS[:, :s])
            loss = loss + F.cross_entropy(
                logits_TV.masked_fill(~mask, HIDDEN), codes_TS[:, s], reduction="none"
            )
        return loss

    def code_vectors(self, s: int) -> Tensor:
        """(V, D) of the codes at position s by themselves, whatever stands before them."""
        if s == 0:
            return self.prefixes.vectors()[1 : 1 + self.sizes[0]]
        at = self.prefixes.offsets[s]
        return self.prefixes.code.weight[at : at + self.sizes[s]]


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
        self.tasks = tasks

    def encode(self, codes: Mapping[str, Tensor], moment_BL: Tensor) -> dict[str, Memory]:
        """What each stream's decoder reads, from the codes (B, L, S) of each; padding at moment PADDING."""
        parts = [stream.items(codes[name]) for name, stream in self.streams.items()]
        x = torch.stack(parts).sum(dim=0) * len(parts) ** -0.5
        x = self.dropout(torch.cat([self.start.expand(len(x), 1, -1), x], dim=1))
        moment = F.pad(moment_BL, (1, 0), value=START)
        bias = self.bias(moment, moment, own=True)
        for layer in self.encoder:
            x, _ = layer(x, bias)
        x = self.dropout(self.norm(x))
        return {name: stream.memory(x, moment) for name, stream in self.streams.items()}

    def losses(
        self,
        codes: Mapping[str, Tensor],
        moment_BL: Tensor,
        target_BL: Tensor,
        allowed: Mapping[str, Sequence[Tensor]],
        wanted: Mapping[str, Tensor] | None = None,
        drawn: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """(T,) losses of the T targets: one a stream, and "contrast" and "transfer" where there are tasks.

        codes: by stream (B, L, S).   allowed: by stream the codes (T, V) that exist below each target's prefix.
        wanted: by stream the frozen vectors (T, C) of the targets.
        drawn: by stream the vectors (M, C) of drawn items, and which are the target itself (T, M).
        """
        for stream in self.streams.values():
            stream.prefixes.forget()
        memories = self.encode(codes, moment_BL)
        found: dict[str, Tensor] = {}
        summaries: dict[str, Tensor] = {}
        for name, stream in self.streams.items():
            states, past = stream.states(memories[name], codes[name], moment_BL)
            found[name] = stream.log_loss(states[target_BL], codes[name][target_BL], allowed[name])
            if self.tasks is not None:
                summary = self.tasks.summaries[name]
                summaries[name] = summary(stream, memories[name], past, codes[name], moment_BL)[target_BL]
        tasks = self.tasks
        if tasks is None:
            return found
        if tasks.contrast is not None and wanted is not None:
            parts = []
            for name, summary_TD in summaries.items():
                guess_TC = tasks.summaries[name].project(summary_TD).float()
                if tasks.contrast == "smooth-l1":
                    parts.append(smooth_l1(guess_TC, wanted[name]))
                else:
                    assert drawn is not None
                    parts.append(info_nce(guess_TC, wanted[name], *drawn[name]))
            found["contrast"] = torch.stack(parts).sum(dim=0)
        if tasks.transfer is not None:
            truth = codes[BEHAVIOUR][target_BL]
            guide = summaries[SEMANTIC].detach()  # semantics teach behaviour, not the other way
            found["transfer"] = tasks.transfer.loss(self.streams[BEHAVIOUR], truth, guide)
        return found


class Tasks(nn.Module):
    """What only learning needs: a summary token a stream, and the transfer from semantics to behaviour.

    contrast: how summaries are pulled towards the frozen vectors of the next item, or None.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        content_widths: Mapping[str, int],
        contrast: Literal["smooth-l1", "info-nce"] | None,
        transfer: bool,
    ) -> None:
        super().__init__()
        self.contrast = contrast
        summaries = {name: Summary(stream, content_widths[name]) for name, stream in streams.items()}
        self.summaries: Mapping[str, Summary] = nn.ModuleDict(summaries)  # type: ignore[assignment]
        self.transfer = Transfer(streams[BEHAVIOUR]) if transfer else None


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
        codes_BLS: Tensor,
        moment_BL: Tensor,
    ) -> Tensor:
        """(B, L, D) of L targets: the last code and the token go through the decoder after `past`.

        The positions that predict codes are done by then, so this cannot move a bit of them.
        """
        last = stream.written(codes_BLS)[..., -1:, :]
        x = torch.cat([last, self.token.expand(*last.shape)], dim=2)
        later = torch.zeros(2, self.bias_self.shape[-1], dtype=torch.bool)
        later[0, -1] = True
        bias_self = self.bias_self.masked_fill(later, HIDDEN)
        bias_cross = self.bias_cross(moment_BL, memory.moment_BK, own=False)
        states, _ = stream.positions(x, memory, moment_BL, bias_self, bias_cross, past)
        return states[:, :, 1]


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
        self.layer = DecoderLayer(c.width, c.heads, c.head_width, c.hidden, c.dropout)
        self.norm = nn.RMSNorm(c.width, eps=1e-6)
        self.recognise = Linear(c.width, 1, c.width**-0.5)

    def forward(self, x_TSD: Tensor, guide_TD: Tensor) -> Tensor:
        """(T, S + 1, D) states of [CLS] and of S inputs; every position sees every other."""
        x = torch.cat([self.cls.expand(len(x_TSD), 1, -1), x_TSD + self.place], dim=1)
        x, _ = self.layer.over_codes(x, self.bias_self)
        kv = self.layer.cross_attention.keys_values(guide_TD[:, None])  # one key: all attend to it alike
        return self.norm(self.layer.over_history(x, kv, torch.zeros(())))

    def loss(self, stream: Stream, codes_TS: Tensor, guide_TD: Tensor) -> Tensor:
        """(T,) L_recon + L_recog: hidden codes are rebuilt; true codes are told from partly replaced ones."""
        vectors = [stream.code_vectors(s) for s in range(len(stream.sizes))]

        def read(codes: Tensor) -> Tensor:
            rows = [F.embedding(codes[:, s], table) for s, table in enumerate(vectors)]
            return torch.stack(rows, dim=1) * self.width**0.5

        T = len(codes_TS)
        hide_TS = torch.rand(codes_TS.shape) < MASKED
        x = torch.cat([read(codes_TS), read(replaced(codes_TS, stream.sizes))])
        covered = torch.where(hide_TS[..., None], self.hidden, x[:T])
        states = self(torch.cat([covered, x]), guide_TD.repeat(3, 1))
        rebuilt = torch.zeros(T)
        for s, table in enumerate(vectors):
            logits_TV = (states[:T, s + 1] @ table.T).float()
            missed = F.cross_entropy(logits_TV, codes_TS[:, s], reduction="none")
            rebuilt = rebuilt + missed * hide_TS[:, s]
        true, false = self.recognise(states[T:, 0]).float()[:, 0].split(T)
        return rebuilt + F.softplus(-true) + F.softplus(false)


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
