"""Compares every operation, forward and backward, with PyTorch in float64, on random inputs of many shapes.

Buffers that an operation overwrites start as NaN. Buffers that it adds to start at 0.25.
"""

from __future__ import annotations

import ctypes as c
import math

import numpy as np
import torch

from .blocks import TYPES, dequantised, random_blocks
from .library import (OUTPUT, PAIR_COST, POSITION, TOKEN, AdamwStep, AttentionKind, Gemm, Gpu, Matrix, NormKind, Packed,
                      Parameter, Preference, RmspropStep)

HELD = 0.25
# Tolerance relative to the largest number, for sums of up to some thousand f32 numbers.
SUMS = 2e-5
# Relative errors of an operand. bf16 keeps eight bits; TF32 keeps eleven, but may truncate instead of rounding.
BF16, TF32 = 2.0 ** -8, 2.0 ** -10

PAIRS = {
    "one row": [([1], [2], [3])],
    "short": [([1, 2, 3], [4, 5, 6, 7], [8, 9])],
    "several": [([1, 2, 3, 4], [5, 3], [2, 2, 2]), ([3], [1, 1, 1, 1, 1], [6]), ([7, 7], [7, 7], [7, 3])],
    "tiles": [(list(range(70)), list(range(45)), list(range(33))), (list(range(20)), list(range(9)), list(range(64)))],
}


class Checker:
    """Compares results and records each operation's largest error as a multiple of its bound."""

    def __init__(self):
        self.worst: dict[str, float] = {}
        self.faults: list[str] = []
        self.n = 0

    def close(self, operation: str, found: np.ndarray, expected, what: str, bound=0.0, sums: float = SUMS) -> None:
        expected = np.asarray(expected, dtype=np.float64).reshape(found.shape)
        allowed = np.asarray(bound) + sums * max(1.0, float(np.abs(expected).max(initial=0.0)))
        distance = np.abs(found.astype(np.float64) - expected)
        ratio = float(np.max(distance / allowed, initial=0.0)) if np.isfinite(distance).all() else math.inf
        self.worst[operation] = max(self.worst.get(operation, 0.0), ratio)
        self.n += 1
        if ratio > 1.0 and len(self.faults) < 20:
            self.faults.append(f"{operation}, {what}: {ratio:.1f} times its bound")


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def tensor(array: np.ndarray, gradient: bool = False) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=gradient)


def check_products(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    for name, (number, length, n_bytes, _) in TYPES.items():
        for n_out, n_in in ((1, length), (37, 3 * length if length > 1 else 45), (200, 512),
                            (600, 256)):
            data = random_blocks(name, n_out * n_in, random)
            w = dequantised(name, data).reshape(n_out, n_in)
            blocks = gpu.bytes(data)
            rounded = gpu.memory(2 * n_out * n_in)
            gpu.call("round_blocks", number, blocks, n_out * n_in, rounded)
            # Use the smallest parts, of 256 rows, for matrices with more rows than that.
            gpu.call("set_part", 0 if n_out > 256 else 256 << 20)
            bits = gpu.read(rounded, n_out * n_in, dtype=np.uint16).astype(np.uint32) << 16
            found = bits.view(np.float32)
            # Half a step of bf16, plus the rounding to f32 before it.
            check.close("dequantise", found, w.reshape(-1), f"{name} [{n_out}][{n_in}]", np.abs(w.reshape(-1)) * BF16 * 1.01,
                        sums=1e-9)
            for n_rows in (1, 19):
                x, dy = normal(random, n_rows, n_in), normal(random, n_rows, n_out)
                bound, bound_back = (2 * BF16 * 1.01 * m for m in (np.abs(x) @ np.abs(w).T, np.abs(dy) @ np.abs(w)))
                for matrix in (Matrix(number, n_in, n_out, blocks, None), Matrix(number, n_in, n_out, None, rounded)):
                    what = f"{name} [{n_out}][{n_in}], {n_rows} rows, {'blocks' if matrix.blocks else 'bf16'}"
                    on, y = gpu.array(x), gpu.poison(n_rows, n_out)
                    gpu.product(matrix, on, n_rows, y)
                    check.close("product", gpu.read(y, n_rows, n_out), x @ w.T, what, bound)
                    ody, dx = gpu.array(dy), gpu.array(np.full((n_rows, n_in), HELD))
                    gpu.call("product_back", c.byref(matrix), ody, n_rows, dx)
                    check.close("product back", gpu.read(dx, n_rows, n_in), HELD + dy @ w, what, bound_back)
                    gpu.release(on, y, ody, dx)
            packed = Packed([([0, 0], [0], [0, 0])])
            packed.tokens = [int(t) for t in random.integers(0, n_out, len(packed.tokens))]
            rows = gpu.rows(packed)
            y = gpu.poison(len(packed.tokens), n_in)
            gpu.call("embed", c.byref(Matrix(number, n_in, n_out, blocks, None)), rows, 3.0, y)
            check.close("embed", gpu.read(y, len(packed.tokens), n_in), 3 * w[packed.tokens], name, sums=1e-6)
            gpu.close_rows(rows)
            gpu.release(blocks, rounded, y)
    check_products_of_one_input(gpu, check, random)
    for m, n, k in ((1, 1, 1), (5, 1, 16), (17, 33, 9), (128, 64, 300)):
        for transpose_a in (False, True):
            for transpose_b in (False, True):
                for alpha, beta in ((1.0, 0.0), (-0.5, 1.0), (2.0, 0.75)):
                    a, b, before = normal(random, m, k), normal(random, k, n), normal(random, m, n)
                    on = [gpu.array(a.T if transpose_a else a), gpu.array(b.T if transpose_b else b)]
                    to = gpu.poison(m, n) if beta == 0 else gpu.array(before)
                    gpu.call("multiply", c.byref(Gemm(m, n, k, transpose_a, transpose_b, alpha, beta)), *on, to)
                    a64, b64 = a.astype(np.float64), b.astype(np.float64)
                    expected = alpha * (a64 @ b64) + (beta * before if beta else 0)
                    bound = abs(alpha) * 2 * TF32 * 1.01 * (np.abs(a64) @ np.abs(b64))
                    check.close("dense product", gpu.read(to, m, n), expected, f"{m} {n} {k}", bound)
                    gpu.release(*on, to)


def check_products_of_one_input(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    """Matrices with a common input but different types, as q, k and v may be."""
    n_in, n_rows = 512, 19
    x = normal(random, n_rows, n_in)
    with gpu.scope():
        on, matrices, weights = gpu.array(x), [], []
        for name, n_out in (("Q4_K", 64), ("Q8_0", 33), ("BF16", 7)):
            data = random_blocks(name, n_out * n_in, random)
            weights.append(dequantised(name, data).reshape(n_out, n_in))
            matrices.append(Matrix(TYPES[name][0], n_in, n_out, gpu.bytes(data), None))
        ys = [gpu.poison(n_rows, len(w)) for w in weights]
        gpu.call("products", (Matrix * len(ys))(*matrices), len(ys), on, n_rows, (c.c_void_p * len(ys))(*ys))
        for y, w in zip(ys, weights):
            check.close("products", gpu.read(y, n_rows, len(w)), x @ w.T, "of one input", 2 * BF16 * 1.01 * (np.abs(x) @ np.abs(w).T))


def check_lookups(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    for what, pairs in PAIRS.items():
        packed = Packed(pairs)
        rows = gpu.rows(packed)
        n_outputs = len(packed.output_rows)
        indices = [(TOKEN, 0, packed.tokens), (POSITION, 0, packed.positions), (OUTPUT, 0, packed.output_rows)]
        if n_outputs > 2:
            indices.append((OUTPUT, 1, packed.output_rows[1:-1]))
        for kind, first, index in indices:
            n_table = max(max(index) + 1, len(packed.tokens))
            for n_cols in (1, 7, 300):
                table, dy = normal(random, n_table, n_cols), normal(random, len(index), n_cols)
                on = [gpu.array(table), gpu.poison(len(index), n_cols), gpu.array(dy), gpu.array(np.full_like(table, HELD))]
                gpu.call("gather", on[0], n_cols, kind, first, len(index), rows, 0.5, on[1])
                check.close("gather", gpu.read(on[1], len(index), n_cols), 0.5 * table[index], what)
                gpu.call("scatter_add", on[2], n_cols, kind, first, len(index), rows, -2.0, on[3])
                expected = np.full(table.shape, HELD)
                np.add.at(expected, index, -2.0 * dy.astype(np.float64))
                check.close("scatter", gpu.read(on[3], n_table, n_cols), expected, what)
                gpu.release(*on)
        gpu.close_rows(rows)


def check_norms(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    for is_layer in (False, True):
        for n_rows, n_cols in ((1, 1), (5, 16), (9, 33), (300, 64), (3, 1024), (70, 1500), (2, 4096)):
            kind = NormKind(is_layer, 1e-5)
            # The mean is large compared with the deviation, as in a residual stream.
            x, weight, bias, dy = 2 + normal(random, n_rows, n_cols), normal(random, n_cols), normal(random, n_cols), normal(
                random, n_rows, n_cols)
            tx, tw, tb = tensor(x, True), tensor(weight, True), tensor(bias, True)
            mean = tx.mean(-1, keepdim=True) if is_layer else 0.0
            square = ((tx - mean) ** 2).mean(-1, keepdim=True)
            y = (tx - mean) / torch.sqrt(square + 1e-5) * tw + tb
            y.backward(tensor(dy))
            what = f"{'layer' if is_layer else 'rms'} [{n_rows}][{n_cols}]"
            on = [gpu.array(a) for a in (x, weight, bias, dy)]
            out, plain = gpu.poison(n_rows, n_cols), gpu.poison(n_rows, n_cols)
            gpu.call("norm", c.byref(kind), on[0], on[1], on[2], n_rows, n_cols, out)
            gpu.call("norm", c.byref(kind), on[0], on[1], None, n_rows, n_cols, plain)
            check.close("norm", gpu.read(out, n_rows, n_cols), y.detach(), what)
            check.close("norm", gpu.read(plain, n_rows, n_cols), (y - tb).detach(), what)
            gradients = [gpu.array(np.full(s, HELD)) for s in ((n_rows, n_cols), n_cols, n_cols)]
            gpu.call("norm_back", c.byref(kind), on[0], on[1], on[3], n_rows, n_cols, *gradients)
            # With one column, x - mean is only rounding error, divided by the root of epsilon.
            loose = 1e-3 if n_cols == 1 else 0.0
            for at, of, shape in zip(gradients, (tx, tw, tb), ((n_rows, n_cols), (n_cols,), (n_cols,))):
                check.close("norm back", gpu.read(at, *shape), HELD + of.grad, what, loose)
            gpu.release(*on, out, plain, *gradients)


def rotated(x: torch.Tensor, positions: list[int], frequencies: np.ndarray, halves: bool) -> torch.Tensor:
    n = len(frequencies)
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * tensor(frequencies)[None, :]
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    a, b = (x[..., :n], x[..., n:2 * n]) if halves else (x[..., 0:2 * n:2], x[..., 1:2 * n:2])
    turned = (a * cosine - b * sine, a * sine + b * cosine)
    first = torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)
    return torch.cat([first, x[..., 2 * n:]], -1)


def check_rope(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    for what, pairs in PAIRS.items():
        packed = Packed(pairs)
        rows, n_rows = gpu.rows(packed), len(packed.tokens)
        for n_heads, dim, n_pairs in ((1, 2, 1), (3, 12, 3), (4, 64, 32)):
            for halves in (False, True):
                frequencies = (0.7 / (1 + np.arange(n_pairs))).astype(np.float32)
                x, dy = normal(random, n_rows, n_heads, dim), normal(random, n_rows, n_heads, dim)
                tx = tensor(x, True)
                y = rotated(tx, packed.positions, frequencies, halves)
                y.backward(tensor(dy))
                for back, data, expected in ((0, x, y.detach()), (1, dy, tx.grad)):
                    at = gpu.array(data)
                    gpu.call("rope", rows, frequencies.ctypes.data, n_pairs, halves, back, n_heads, dim, at)
                    check.close("rope back" if back else "rope", gpu.read(at, n_rows, n_heads, dim), expected, what)
                    gpu.release(at)
        gpu.close_rows(rows)


def attended(q, k, v, mask: torch.Tensor, distance: torch.Tensor, scale: float, slopes: torch.Tensor):
    """Attention's output [R][H][D] and log-sum-exp [R][H], for q, k and v with the same number of heads."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale - slopes[:, None, None] * distance
    scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1).T


def check_attention(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    shapes = ((1, 1, 1), (4, 4, 8), (6, 2, 5), (4, 1, 64), (2, 2, 80), (4, 2, 128), (2, 1, 200), (1, 1, 256))
    for what, pairs in PAIRS.items():
        packed = Packed(pairs)
        rows, n_rows = gpu.rows(packed), len(packed.tokens)
        positions = torch.tensor(packed.positions, dtype=torch.float64)
        distance = positions[:, None] - positions[None, :]
        for n_head, n_head_kv, dim in shapes:
            for window, alibi in ((0, False), (3, False), (0, True), (2, True)):
                slopes = (2.0 ** -(1 + np.arange(n_head) % 8)).astype(np.float32) if alibi else np.zeros(n_head, np.float32)
                # Larger than 1 / sqrt(dim), so that some rows attend to few others.
                scale = 2.0 / math.sqrt(dim)
                q, dout = normal(random, n_rows, n_head, dim), normal(random, n_rows, n_head, dim)
                k, v = normal(random, n_rows, n_head_kv, dim), normal(random, n_rows, n_head_kv, dim)
                tq, tk, tv = tensor(q, True), tensor(k, True), tensor(v, True)
                group = n_head // n_head_kv
                out, lse = attended(tq, tk.repeat_interleave(group, 1), tv.repeat_interleave(group, 1),
                                    torch.tensor(packed.sees(window)), distance, scale, tensor(slopes))
                out.backward(tensor(dout))
                name = f"{what}, {n_head} {n_head_kv} {dim}, window {window}, {'ALiBi' if alibi else 'plain'}"
                kind = AttentionKind(n_head, n_head_kv, dim, scale, window, slopes.ctypes.data if alibi else None)
                on = [gpu.array(a) for a in (q, k, v)]
                got = [gpu.poison(n_rows, n_head, dim), gpu.poison(n_rows, n_head)]
                gpu.call("attention", c.byref(kind), rows, *on, *got)
                check.close("attention", gpu.read(got[0], n_rows, n_head, dim), out.detach(), name)
                check.close("attention", gpu.read(got[1], n_rows, n_head), lse.detach(), name)
                gradients = [gpu.array(np.full(a.shape, HELD)) for a in (q, k, v)]
                odout = gpu.array(dout)
                gpu.call("attention_back", c.byref(kind), rows, *on, *got, odout, *gradients)
                for at, of in zip(gradients, (tq, tk, tv)):
                    check.close("attention back", gpu.read(at, *of.shape), HELD + of.grad, name)
                gpu.release(*on, *got, odout, *gradients)
        gpu.close_rows(rows)


def check_activations(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    functions = (torch.nn.functional.silu, lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
    for number, function in enumerate(functions):
        for n in (1, 255, 10_001):
            for gated in (False, True):
                gate, up, dy = 3 * normal(random, n), normal(random, n), normal(random, n)
                tg, tu = tensor(gate, True), tensor(up, True)
                y = function(tg) * tu if gated else function(tg)
                y.backward(tensor(dy))
                on = [gpu.array(gate), gpu.array(up) if gated else None, gpu.array(dy)]
                got, dgate = gpu.poison(n), gpu.array(np.full(n, HELD))
                dup = gpu.array(np.full(n, HELD)) if gated else None
                gpu.call("activate", number, on[0], on[1], n, got)
                gpu.call("activate_back", number, *on, n, dgate, dup)
                check.close("activation", gpu.read(got, n), y.detach(), f"{number} of {n}")
                check.close("activation back", gpu.read(dgate, n), HELD + tg.grad, f"{number} of {n}")
                if gated:
                    check.close("activation back", gpu.read(dup, n), HELD + tu.grad, f"{number} of {n}")
                gpu.release(*filter(None, [*on, got, dgate, dup]))


def check_sums(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    for n_rows, n_cols in ((1, 1), (5, 3), (700, 33), (65, 1000)):
        x, y, bias, factors = (normal(random, *s) for s in ((n_rows, n_cols), (n_rows, n_cols), (n_cols,), (n_rows,)))
        what, shape = f"[{n_rows}][{n_cols}]", (n_rows, n_cols)
        ox, oy, ob = gpu.array(x), gpu.array(y), gpu.array(bias)
        gpu.call("add", -0.5, ox, n_rows * n_cols, oy)
        check.close("add", gpu.read(oy, *shape), y - 0.5 * x.astype(np.float64), what)
        gpu.call("copy", ox, n_rows * n_cols, oy)
        check.close("copy", gpu.read(oy, *shape), x, what, sums=0.0 + 1e-30)
        gpu.call("add_to_rows", ob, n_rows, n_cols, oy)
        check.close("add to rows", gpu.read(oy, *shape), x + bias.astype(np.float64), what)
        gpu.call("sum_rows", ox, n_rows, n_cols, ob)
        check.close("sum of rows", gpu.read(ob, n_cols), bias + x.sum(0, dtype=np.float64), what)
        of_rows = gpu.array(factors)
        gpu.call("scale_rows", of_rows, n_rows, n_cols, ox)
        check.close("scaled rows", gpu.read(ox, *shape), x * factors[:, None].astype(np.float64), what)
        to, before = gpu.array(np.full((n_rows, 9), HELD)), gpu.array(x)
        n = min(n_cols, 4)
        gpu.call("add_columns", before, n_cols, n_cols - n, n_rows, to, 9, 5, n)
        expected = np.full((n_rows, 9), HELD)
        expected[:, 5:5 + n] += x[:, n_cols - n:]
        check.close("columns", gpu.read(to, n_rows, 9), expected, what)
        gpu.release(ox, oy, ob, to, before, of_rows)


def check_head(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    packed = Packed(PAIRS["several"])
    rows, n = gpu.rows(packed), len(packed.output_rows)
    for first, count in ((0, n), (2, 3)):
        tokens = packed.output_tokens[first:first + count]
        for n_vocab, scale in ((10, 1.0), (33, 0.0625), (5000, 3.0), (70_001, 1.0)):
            logits = 5 * normal(random, count, n_vocab)
            tl = tensor(logits, True)
            logps = torch.log_softmax(tl * scale, -1)[range(count), tokens]
            logps.sum().backward()
            for gradient in (0, 1):
                at, found = gpu.array(logits), gpu.poison(count)
                gpu.call("logprobs", rows, first, count, scale, n_vocab, gradient, at, found)
                check.close("log-probabilities", gpu.read(found, count), logps.detach(), f"{n_vocab}")
                after = gpu.read(at, count, n_vocab)
                expected = tl.grad if gradient else logits
                check.close("log-probabilities back", after, expected, f"{n_vocab}", sums=SUMS if gradient else 1e-30)
                gpu.release(at, found)
    gpu.close_rows(rows)


def check_preference(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    functional = torch.nn.functional
    for what, pairs in PAIRS.items():
        packed = Packed(pairs)
        rows, n_outputs, n_pairs = gpu.rows(packed), len(packed.output_rows), len(pairs)
        lengths = torch.tensor([end - first for first, end in packed.answers], dtype=torch.float64).view(-1, 2)
        for number, (name, beta, smoothing) in enumerate((("sigmoid", 0.1, 0.2), ("IPO", 0.3, 0.0), ("hinge", 0.5, 0.0))):
            logps = -3 + normal(random, n_outputs)
            policy = tensor(logps, True)
            sums = torch.stack([policy[first:end].sum() for first, end in packed.answers]).view(-1, 2)
            references = sums.detach().numpy() + 2 * random.standard_normal((n_pairs, 2))
            ratios = sums - torch.tensor(references)
            h = beta * (ratios[:, 0] - ratios[:, 1])
            by_token = (ratios / lengths)[:, 0] - (ratios / lengths)[:, 1]
            losses = (-(1 - smoothing) * functional.logsigmoid(h) - smoothing * functional.logsigmoid(-h),
                      (by_token - 1 / (2 * beta)) ** 2, torch.relu(1 - h))[number]
            # A batch may be only part of a step, so average over twice its number of pairs.
            (losses.sum() / (2 * n_pairs)).backward()
            kind = Preference(number, beta, smoothing, 2 * n_pairs)
            on, dlogps = gpu.array(logps), gpu.poison(n_outputs)
            costs = np.full((n_pairs, len(PAIR_COST)), np.nan)
            gpu.call("preference_loss", c.byref(kind), rows, references.ctypes.data, on, dlogps, costs.ctypes.data)
            check.close("preference loss", costs[:, :2], sums.detach(), f"{what}, {name}", sums=1e-14)
            check.close("preference loss", costs[:, 2], losses.detach(), f"{what}, {name}", sums=1e-12)
            check.close("preference back", gpu.read(dlogps, n_outputs), policy.grad, f"{what}, {name}", sums=1e-7)
            gpu.release(on, dlogps)
        # If policy and reference are equal, the loss is exactly ln 2.
        on, dlogps = gpu.array(np.full(n_outputs, -1.5)), gpu.memory(4 * n_outputs)
        references = -1.5 * lengths.numpy()
        gpu.call("preference_loss", c.byref(Preference(0, 0.1, 0.0, n_pairs)), rows, references.ctypes.data, on, dlogps,
                 costs.ctypes.data)
        check.close("preference at start", costs[:, 2], np.full(n_pairs, math.log(2)), what, sums=1e-30)
        gpu.release(on, dlogps)
        gpu.close_rows(rows)


def check_memory(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    """Memory allocated within a scope is free again afterwards, even if the scope ended with an error."""
    before, taken, n_bytes = gpu.free_bytes(), 0, 64 << 20
    try:
        with gpu.scope():
            gpu.memory(n_bytes)
            gpu.rows(Packed(PAIRS["several"]))
            taken = before - gpu.free_bytes()
            raise RuntimeError("as if the GPU were out of memory")
    except RuntimeError:
        pass
    # The tolerance allows for other programs that allocate at the same time.
    check.close("memory", np.array([taken, before - gpu.free_bytes()]) / n_bytes, [1.0, 0.0], "", 0.1)


def check_optimizers(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    lengths = [1 + i * i % 1501 for i in range(150)]
    gradients, first = ([normal(random, n) for n in lengths] for _ in range(2))
    on = [gpu.array(g) for g in gradients]
    total = c.c_double()
    addresses, numbers = (c.c_void_p * len(on))(*on), np.array(lengths, dtype=np.int64)
    gpu.call("square_sum", addresses, numbers.ctypes.data, len(on), c.byref(total))
    expected = sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients)
    check.close("sum of squares", np.array([total.value]), [expected], "", sums=1e-12)
    for kind in ("RMSprop", "AdamW"):
        parameters = [tensor(x, True) for x in first]
        make = torch.optim.RMSprop if kind == "RMSprop" else torch.optim.AdamW
        optimizer = make(parameters, lr=0.01) if kind == "RMSprop" else make(parameters, lr=0.01, weight_decay=0.1)
        values, means, squares = [gpu.array(x) for x in first], [], []
        for n in lengths:
            means.append(gpu.array(np.zeros(n)))
            squares.append(gpu.array(np.zeros(n)))
        table = (Parameter * len(on))(*(
            Parameter(n, g, m if kind == "AdamW" else None, s, x)
            for n, g, m, s, x in zip(lengths, on, means, squares, values)))
        for step in (1, 2, 3):
            for p, g in zip(parameters, gradients):
                p.grad = tensor(0.5 * g)
            optimizer.step()
            if kind == "RMSprop":
                gpu.call("rmsprop", c.byref(RmspropStep(0.01, 0.99, 1e-8, 0.5)), table, len(on))
            else:
                corrections = (1 - 0.9 ** step, math.sqrt(1 - 0.999 ** step))
                gpu.call("adamw", c.byref(AdamwStep(0.01, 0.9, 0.999, 1e-8, 0.1, 0.5, *corrections)), table, len(on))
        for at, p, n in zip(values, parameters, lengths):
            check.close(kind, gpu.read(at, n), p.detach(), f"{n} numbers", sums=1e-5)
        gpu.release(*values, *means, *squares)
    gpu.release(*on)


ALL = (check_products, check_lookups, check_norms, check_rope, check_attention, check_activations, check_sums, check_head,
       check_preference, check_optimizers, check_memory)
