"""MIMN's recurrence as loops over numbers: all steps of a user's life forward, and the gradient back through them.

Paper: Pi et al., KDD 2019 (see `mimn.py`), whose step this is. From the state before, with x what happened:

    h ← GRU([x, r], h)                                  the controller; r is what was read at the step before
    k_q = tanh, β_q = 1 + softplus, e = σ, a = tanh     of affine maps of h; q: to read, to write
    w_q = softmax_i(β_q cos(k_q, M_i))                  addressing
    w̃ = w_write P, P = softmax(W_g g + b)               each row; g: shares of the writes so far
    S_i ← GRU([x, M_i], S_i)                            for the `top` slots i of largest w_read; no gradient to M_i
    r ← w_read M,   M ← M ∘ (1 − w̃ eᵀ) + w̃ aᵀ,   u ← u + w̃

A step is some forty thousand products, which take less time than the thirty calls to a library that they would be. What x gives to both GRUs is
projected for all steps before, in one fixed order of summation, so that a behaviour gets the same bits alone and among
a thousand; the gradients of the weights are products over all steps, made afterwards by BLAS. Between them the kernels
run along one user's life at a time. Users are divided between as many threads as torch has, and nobody's
state depends on that.

Letters: B users, R behaviours of all users, one user's after the other's, in order of time, M slots and channels, D width
of a slot, C width of a channel, G = 3C for the gates reset, update, new, as torch orders them, E width of a behaviour,
T channels that are updated, Q = 1 + T GRU cells a step: the controller's, then the channels', A for k and β to
read, k and β to write, e, a, and any number that are not used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiglon.nn.loops import ONE, ZERO, exp_of_negative, sigmoid, tanh
from tiglon.threads import divide

# 32 inputs' weights to both GRUs are 24 KiB, the first-level cache; used for 64 behaviours
_ROWS, _TILE = 64, 32
_SHARD = 256  # behaviours of one thread: below, starting a second costs more than it saves
_TINY = np.float32(1e-12)


class Weights(NamedTuple):
    """What a step is made of, beside what x gives; of pairs, the controller's first and the channels' second.

    Tensors, all with a gradient; or arrays for the kernels.
    """

    input: Any  # (2, G, D), of r and of M_i
    hidden: Any  # (2, G, C)
    bias: Any  # (2, C), of what the hidden state gives to "new"
    act: Any  # (A, C)
    act_bias: Any  # (A,)
    transfer: Any  # (M², M), W_g
    transfer_bias: Any  # (M²,), b


class _Kept(NamedTuple):
    """Of every step what its gradient needs; a row a step, or a row a thread where there is none."""

    memory: Any  # (R, M, D), before the step
    size: Any  # (R, M + 2), lengths of slots and keys, at least 1e-12
    share: Any  # (R, M)
    total: Any  # (R,), of usage
    input: Any  # (R, Q, D): r, M_i
    before: Any  # (R, Q, C): h, S_i before the step
    gate: Any  # (R, Q, 4C): reset, update, new, and what the hidden state gives to new
    after: Any  # (R, C): h after the step
    act: Any  # (R, A), through their nonlinearities, but for β
    strength: Any  # (R, 2): β
    cosine: Any  # (R, 2, M)
    weight: Any  # (R, 2M): w_read, w_write
    transfer: Any  # (R, M²): P
    balanced: Any  # (R, M): w̃
    channel: Any  # (R, T) int64


class _Delta(NamedTuple):
    """The gradient at every step of what the weights gave."""

    input: Any  # (R, Q, G), to all gates from [x, r] or [x, M_i]
    new: Any  # (R, Q, C), to "new" from the hidden state; to the other gates the same as `input`
    act: Any  # (R, A)
    transfer: Any  # (R, M²)


def project(x_RE: Tensor, weight_GE: Tensor, bias_G: Tensor) -> Tensor:
    """(R, G): x Wᵀ + b, where a row's bits do not depend on how many rows there are."""
    return _Project.apply(x_RE, weight_GE, bias_G)


def steps(
    from_x_R2G: Tensor,
    mask_BL: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    top: int,
) -> tuple[Tensor, ...]:
    """The state after all behaviours: memory, channels, h, r, usage, in this order as before.

    from_x_R2G: what x gives to the controller and to the channels, of the behaviours where mask_BL is True.
    Nothing is kept where no gradient is asked for.
    """
    tensors = [from_x_R2G, *state, *weights]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    first_B = torch.nn.functional.pad(mask_BL.sum(dim=1).cumsum(0), (1, 0)).numpy()  # the last: where all end
    return _Steps.apply(first_B, top, keep, *tensors)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RE: Tensor, weight_GE: Tensor, bias_G: Tensor) -> Tensor:
        ctx.save_for_backward(x_RE, weight_GE)
        out_RG = torch.empty(len(x_RE), len(bias_G))
        x, weight, bias, out = (_array(part) for part in (x_RE, weight_GE.T, bias_G, out_RG))
        divide(
            len(x), len(x) // _SHARD, lambda low, high, _: _project(x[low:high], weight, bias, out[low:high])
        )
        return out_RG

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        x_RE, weight_GE = ctx.saved_tensors
        (of_RG,) = given
        with torch.autocast(of_RG.device.type, enabled=False):
            of_x = of_RG @ weight_GE if ctx.needs_input_grad[0] else None
            return of_x, of_RG.T @ x_RE, of_RG.sum(dim=0)


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first_B: np.ndarray, top: int, keep: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights = Weights(*tensors[6:])
        state = tuple(part.clone(memory_format=torch.contiguous_format) for part in tensors[1:6])
        B, M, D = state[0].shape
        R, C, Q = len(tensors[0]), state[1].shape[2], 1 + top
        rows = R if keep else torch.get_num_threads()
        kept = _Kept(
            memory=torch.empty(rows, M, D),
            size=torch.empty(rows, M + 2),
            share=torch.empty(rows, M),
            total=torch.empty(rows),
            input=torch.empty(rows, Q, D),
            before=torch.empty(rows, Q, C),
            gate=torch.empty(rows, Q, 4 * C),
            after=torch.empty(rows, C),
            act=torch.empty(rows, len(weights.act)),
            strength=torch.empty(rows, 2),
            cosine=torch.empty(rows, 2, M),
            weight=torch.empty(rows, 2 * M),
            transfer=torch.empty(rows, M * M),
            balanced=torch.empty(rows, M),
            channel=torch.empty(rows, top, dtype=torch.int64),
        )
        from_x = _array(tensors[0])
        W = weights._replace(
            input=weights.input.mT, hidden=weights.hidden.mT, act=weights.act.T, transfer=weights.transfer.T
        )
        W, K = Weights(*map(_array, W)), _Kept(*map(_array, kept))

        def job(low: int, high: int, part: int) -> None:
            users = _users(state, low, high)
            _forward(first_B[low : high + 1], from_x, users, W, K, -1 if keep else part)

        divide(B, R // _SHARD, job)
        if keep:
            ctx.save_for_backward(*weights, *kept)
        ctx.first_B = first_B
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        weights, kept = Weights(*ctx.saved_tensors[:7]), _Kept(*ctx.saved_tensors[7:])
        of_state = tuple(part.clone(memory_format=torch.contiguous_format) for part in given)
        R, Q, C = kept.before.shape
        delta = _Delta(
            input=torch.empty(R, Q, 3 * C),
            new=torch.empty(R, Q, C),
            act=torch.empty(R, len(weights.act)),
            transfer=torch.empty(R, len(weights.transfer)),
        )
        W, K, G = Weights(*map(_array, weights)), _Kept(*map(_array, kept)), _Delta(*map(_array, delta))

        def job(low: int, high: int, part: int) -> None:
            _backward(ctx.first_B[low : high + 1], _users(of_state, low, high), W, K, G)

        divide(len(of_state[0]), R // _SHARD, job)
        with torch.autocast(given[0].device.type, enabled=False):
            return None, None, None, _of_x(delta.input), *of_state, *_of_weights(kept, delta)


def _of_x(delta_RQG: Tensor) -> Tensor:
    """(R, 2, G): all channels of a step take in the same x."""
    if delta_RQG.shape[1] == 2:
        return delta_RQG
    return torch.stack([delta_RQG[:, 0], delta_RQG[:, 1:].sum(dim=1)], dim=1)


def _of_weights(kept: _Kept, delta: _Delta) -> Weights:
    """Sums over all steps of outer products: one matrix product each."""
    inputs, hiddens, biases = [], [], []
    for cells in (slice(0, 1), slice(1, None)):
        of_input, of_new, given, before = (
            part[:, cells].flatten(0, 1) for part in (delta.input, delta.new, kept.input, kept.before)
        )
        C = before.shape[1]
        inputs.append(of_input.T @ given)
        hiddens.append(torch.cat([of_input[:, : 2 * C].T @ before, of_new.T @ before]))
        biases.append(of_new.sum(dim=0))
    return Weights(
        torch.stack(inputs),
        torch.stack(hiddens),
        torch.stack(biases),
        delta.act.T @ kept.after,
        delta.act.sum(dim=0),
        delta.transfer.T @ kept.share,
        delta.transfer.sum(dim=0),
    )


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _users(state: tuple[Tensor, ...], low: int, high: int) -> tuple[np.ndarray, ...]:
    """Some users' rows of a state, which is contiguous: what is written there is written to it."""
    return tuple(part[low:high].numpy() for part in state)


# Every step runs the same compiled code on arrays of the same sizes, so sums may be taken in any order that the
# compiler likes: it is the same at every step. Loops stay apart where one with all their arrays would need more checks
# for overlap than LLVM makes before it gives up on vectors.


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _add_product(x_I: np.ndarray, weight_IO: np.ndarray, out_O: np.ndarray) -> None:
    """out += x W. In passes of eight inputs, so that `out` is read and written less often than W."""
    n = len(x_I)
    whole = n - n % 8
    for i in range(0, whole, 8):
        a, b, c, d, e, f, g, h = x_I[i], x_I[i + 1], x_I[i + 2], x_I[i + 3], x_I[i + 4], x_I[i + 5], x_I[i + 6], x_I[i + 7]  # fmt: skip
        A, B, C, D = weight_IO[i], weight_IO[i + 1], weight_IO[i + 2], weight_IO[i + 3]
        E, F, G, H = weight_IO[i + 4], weight_IO[i + 5], weight_IO[i + 6], weight_IO[i + 7]
        for o in range(len(out_O)):
            out_O[o] = (
                out_O[o]
                + a * A[o]
                + b * B[o]
                + c * C[o]
                + d * D[o]
                + e * E[o]
                + f * F[o]
                + g * G[o]
                + h * H[o]
            )
    for i in range(whole, n):
        a, A = x_I[i], weight_IO[i]
        for o in range(len(out_O)):
            out_O[o] += a * A[o]


@njit(nogil=True, cache=True, error_model="numpy")
def _copy(x: np.ndarray, out: np.ndarray) -> None:
    """What `out[:] = x` does, without its checks, which would cost more than the copy."""
    for i in range(len(out)):
        out[i] = x[i]


@njit(nogil=True, cache=True, error_model="numpy")
def _fill(out: np.ndarray, x: np.float32) -> None:
    for i in range(len(out)):
        out[i] = x


@njit(nogil=True, cache=True, error_model="numpy")
def _project(x_RE: np.ndarray, weight_EG: np.ndarray, bias_G: np.ndarray, out_RG: np.ndarray) -> None:
    R, E = x_RE.shape
    for start in range(0, R, _ROWS):
        stop = min(start + _ROWS, R)
        for r in range(start, stop):
            _copy(bias_G, out_RG[r])
        for e in range(0, E, _TILE):
            for r in range(start, stop):
                _add_product(x_RE[r, e : e + _TILE], weight_EG[e : e + _TILE], out_RG[r])


@njit(nogil=True, cache=True, error_model="numpy")
def _softmax(x: np.ndarray, M: int) -> None:
    """Of every M numbers."""
    for start in range(0, len(x), M):
        most = x[start]
        for i in range(start, start + M):
            most = max(most, x[i])
        for i in range(start, start + M):
            x[i] -= most
    exp_of_negative(x)
    for start in range(0, len(x), M):
        total = ZERO
        for i in range(start, start + M):
            total += x[i]
        for i in range(start, start + M):
            x[i] /= total


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _dot(x: np.ndarray, y: np.ndarray) -> np.float32:
    total = ZERO
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _cell(
    from_x_G: np.ndarray,
    input_D: np.ndarray,
    before_C: np.ndarray,
    input_DG: np.ndarray,
    hidden_CG: np.ndarray,
    bias_C: np.ndarray,
    gate: np.ndarray,
    after_C: np.ndarray,
) -> None:
    """A GRU cell: after = n + z (before − n), n = tanh(what the input gives + reset · what the state gives)."""
    C = len(before_C)
    G = 3 * C
    gates, both, new = gate[:G], gate[: 2 * C], gate[2 * C : G]
    _copy(from_x_G, gates)
    _add_product(input_D, input_DG, gates)
    for c in range(C):  # what the input gives to "new" waits behind the gates
        gate[G + c], new[c] = new[c], bias_C[c]
    _add_product(before_C, hidden_CG, gates)
    sigmoid(both)
    for c in range(C):
        of_state = new[c]
        new[c] = gate[G + c] + both[c] * of_state
        gate[G + c] = of_state
    tanh(new)
    for c in range(C):
        after_C[c] = new[c] + both[C + c] * (before_C[c] - new[c])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _cell_back(
    of_C: np.ndarray,
    before_C: np.ndarray,
    gate: np.ndarray,
    hidden_GC: np.ndarray,
    delta_G: np.ndarray,
    delta_new_C: np.ndarray,
) -> None:
    """of_C: the gradient of the cell after the step, and then of the one before."""
    C = len(before_C)
    reset, update, new, of_state = gate[:C], gate[C : 2 * C], gate[2 * C : 3 * C], gate[3 * C :]
    of_reset, of_update, of_new = delta_G[:C], delta_G[C : 2 * C], delta_G[2 * C :]
    for c in range(C):
        of_new[c] = of_C[c] * (ONE - update[c]) * (ONE - new[c] * new[c])
        of_update[c] = of_C[c] * (before_C[c] - new[c]) * update[c] * (ONE - update[c])
    for c in range(C):
        of_reset[c] = of_new[c] * of_state[c] * reset[c] * (ONE - reset[c])
        delta_new_C[c] = of_new[c] * reset[c]
    for c in range(C):
        of_C[c] *= update[c]
    _add_product(delta_G[: 2 * C], hidden_GC[: 2 * C], of_C)
    _add_product(delta_new_C, hidden_GC[2 * C :], of_C)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _forward(
    first_B: np.ndarray,
    from_x_R2G: np.ndarray,
    state: tuple[np.ndarray, ...],
    W: Weights,
    kept: _Kept,
    spare: int,
) -> None:
    """Carries the state on in place. spare: the row of `kept` that every step writes to; −1: its own."""
    memory_BMD, channels_BMC, controller_BC, last_read_BD, usage_BM = state
    B, M, D = memory_BMD.shape
    T = kept.channel.shape[1]
    for b in range(B):
        memory, channels, controller = memory_BMD[b], channels_BMC[b], controller_BC[b]
        last_read, usage = last_read_BD[b], usage_BM[b]
        for r in range(first_B[b], first_B[b + 1]):
            at = r if spare < 0 else spare
            old, size = kept.memory[at], kept.size[at]
            for i in range(M):
                _copy(memory[i], old[i])

            _copy(last_read, kept.input[at, 0])
            _copy(controller, kept.before[at, 0])
            _cell(from_x_R2G[r, 0], last_read, kept.before[at, 0], W.input[0], W.hidden[0], W.bias[0], kept.gate[at, 0], controller)  # fmt: skip
            _copy(controller, kept.after[at])

            act, strength = kept.act[at], kept.strength[at]
            _copy(W.act_bias, act)
            _add_product(controller, W.act, act)
            for q in range(2):
                s = act[q * (D + 1) + D]
                strength[q] = ONE + max(s, ZERO) + np.log1p(np.exp(-abs(s)))
            erase, add = act[2 * D + 2 : 3 * D + 2], act[3 * D + 2 : 4 * D + 2]
            tanh(act[: 2 * D + 2])  # both keys; between them stands what made β
            sigmoid(erase)
            tanh(add)

            for i in range(M):
                size[i] = max(np.sqrt(_dot(old[i], old[i])), _TINY)
            for q in range(2):
                key, cosine, weight = (
                    act[q * (D + 1) : q * (D + 1) + D],
                    kept.cosine[at, q],
                    kept.weight[at, q * M : (q + 1) * M],
                )
                size[M + q] = max(np.sqrt(_dot(key, key)), _TINY)
                for i in range(M):
                    cosine[i] = _dot(key, old[i]) / (size[M + q] * size[i])
                    weight[i] = strength[q] * cosine[i]
            _softmax(kept.weight[at], M)
            read_weight, write_weight = kept.weight[at, :M], kept.weight[at, M:]

            share, P, balanced = kept.share[at], kept.transfer[at], kept.balanced[at]
            total = ZERO
            for i in range(M):
                total += usage[i]
            kept.total[at] = total
            n = max(total, ONE)
            for i in range(M):
                share[i] = usage[i] / n
            _copy(W.transfer_bias, P)
            _add_product(share, W.transfer, P)
            _softmax(P, M)
            _fill(balanced, ZERO)
            for i in range(M):
                for j in range(M):
                    balanced[j] += write_weight[i] * P[i * M + j]

            for t in range(T):
                i = _next_best(read_weight, kept.channel[at, :t])
                kept.channel[at, t] = i
                _copy(old[i], kept.input[at, 1 + t])
                _copy(channels[i], kept.before[at, 1 + t])
                _cell(from_x_R2G[r, 1], old[i], kept.before[at, 1 + t], W.input[1], W.hidden[1], W.bias[1], kept.gate[at, 1 + t], channels[i])  # fmt: skip

            _fill(last_read, ZERO)
            _add_product(read_weight, old, last_read)
            for i in range(M):
                w, slot, before = balanced[i], memory[i], old[i]
                usage[i] += w
                for d in range(D):
                    slot[d] = before[d] * (ONE - w * erase[d]) + w * add[d]


@njit(nogil=True, cache=True, error_model="numpy")
def _next_best(weight_M: np.ndarray, taken: np.ndarray) -> int:
    """The slot of largest weight that is not taken yet; of equal ones the first."""
    best = -1
    for i in range(len(weight_M)):
        free = True
        for t in taken:
            free = free and t != i
        if free and (best < 0 or weight_M[i] > weight_M[best]):
            best = i
    return best


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _backward(
    first_B: np.ndarray,
    of_state: tuple[np.ndarray, ...],
    W: Weights,
    kept: _Kept,
    delta: _Delta,
) -> None:
    """Carries the gradient of the state back in place, and writes those of every step's affine maps."""
    of_memory_BMD, of_channels_BMC, of_controller_BC, of_last_read_BD, of_usage_BM = of_state
    B, M, D = of_memory_BMD.shape
    T = kept.channel.shape[1]
    of_balanced, of_share, of_cosine = np.empty((3, M), np.float32)
    of_weight = np.empty((2, M), np.float32)
    for b in range(B):
        of_memory, of_channels, of_controller = of_memory_BMD[b], of_channels_BMC[b], of_controller_BC[b]
        of_last_read, of_usage = of_last_read_BD[b], of_usage_BM[b]
        for r in range(first_B[b + 1] - 1, first_B[b] - 1, -1):
            memory, size, act, of_act = kept.memory[r], kept.size[r], kept.act[r], delta.act[r]
            erase, add, strength = act[2 * D + 2 : 3 * D + 2], act[3 * D + 2 : 4 * D + 2], kept.strength[r]

            of_erase, of_add = of_act[2 * D + 2 : 3 * D + 2], of_act[3 * D + 2 : 4 * D + 2]
            _fill(of_act, ZERO)
            for i in range(M):
                w, slot, of_slot = kept.balanced[r, i], memory[i], of_memory[i]
                for d in range(D):
                    of_add[d] += of_slot[d] * w
                    of_erase[d] -= of_slot[d] * w * slot[d]
                total = of_usage[i]
                for d in range(D):
                    total += of_slot[d] * (add[d] - slot[d] * erase[d])
                of_balanced[i] = total
                for d in range(D):
                    of_slot[d] *= ONE - w * erase[d]
            for d in range(D):
                of_add[d] *= ONE - add[d] * add[d]
                of_erase[d] *= erase[d] * (ONE - erase[d])

            for t in range(T):
                _cell_back(of_channels[kept.channel[r, t]], kept.before[r, 1 + t], kept.gate[r, 1 + t], W.hidden[1], delta.input[r, 1 + t], delta.new[r, 1 + t])  # fmt: skip

            write_weight, of_transfer = kept.weight[r, M:], delta.transfer[r]
            for i in range(M):
                w, slot, of_slot = kept.weight[r, i], memory[i], of_memory[i]
                of_weight[0, i] = _dot(of_last_read, slot)
                for d in range(D):
                    of_slot[d] += w * of_last_read[d]
                P = kept.transfer[r, i * M : (i + 1) * M]
                mean = _dot(P, of_balanced)
                of_weight[1, i] = mean
                for j in range(M):
                    of_transfer[i * M + j] = P[j] * write_weight[i] * (of_balanced[j] - mean)
            _fill(of_share, ZERO)
            _add_product(of_transfer, W.transfer, of_share)
            total, n = kept.total[r], max(kept.total[r], ONE)
            level = _dot(of_share, kept.share[r]) if total >= ONE else ZERO
            for i in range(M):
                of_usage[i] += (of_share[i] - level) / n

            for q in range(2):
                key, of_key = act[q * (D + 1) : q * (D + 1) + D], of_act[q * (D + 1) : q * (D + 1) + D]
                weight, cosine, length = kept.weight[r, q * M : (q + 1) * M], kept.cosine[r, q], size[M + q]
                mean = _dot(weight, of_weight[q])
                along = of_strength = ZERO
                for i in range(M):
                    of_logit = weight[i] * (of_weight[q, i] - mean)
                    of_strength += of_logit * cosine[i]
                    of_cosine[i] = strength[q] * of_logit / (length * size[i])
                    back = strength[q] * of_logit * cosine[i]
                    along += back
                    slot, of_slot, across = memory[i], of_memory[i], of_cosine[i]
                    back = back / (size[i] * size[i]) if size[i] > _TINY else ZERO
                    for d in range(D):
                        of_slot[d] += across * key[d] - back * slot[d]
                _add_product(of_cosine, memory, of_key)
                along = along / (length * length) if length > _TINY else ZERO
                for d in range(D):
                    of_key[d] = (of_key[d] - along * key[d]) * (ONE - key[d] * key[d])
                of_act[q * (D + 1) + D] = -np.expm1(ONE - strength[q]) * of_strength

            _add_product(of_act, W.act, of_controller)
            _cell_back(of_controller, kept.before[r, 0], kept.gate[r, 0], W.hidden[0], delta.input[r, 0], delta.new[r, 0])  # fmt: skip
            _fill(of_last_read, ZERO)
            _add_product(delta.input[r, 0], W.input[0], of_last_read)
