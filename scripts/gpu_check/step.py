"""A step of DPO on a model of the llama architecture, on the GPU and in PyTorch.

The GPU runs vendor/cuda's operations in the order in which the trainer calls them. PyTorch uses autograd.
"""

from __future__ import annotations

import ctypes as c
import math
from dataclasses import dataclass

import numpy as np
import torch

from .library import (OUTPUT, PAIR_COST, AttentionKind, Gemm, Gpu, Matrix, NormKind, Packed, Parameter, Preference,
                      RmspropStep)
from .operations import Checker, attended, rotated

NORM = NormKind(0, 1e-5)
BETA = 0.1
LOGIT_BYTES = 256 << 20


@dataclass
class Shape:
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    rank: int
    alpha: float = 16.0

    @property
    def dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of a block, as [n_out, n_in]."""
        n_key = self.n_head_kv * self.dim
        return {"q": (self.n_embd, self.n_embd), "k": (n_key, self.n_embd), "v": (n_key, self.n_embd),
                "o": (self.n_embd, self.n_embd), "gate": (self.n_ff, self.n_embd), "up": (self.n_ff, self.n_embd),
                "down": (self.n_embd, self.n_ff)}

    def frequencies(self) -> np.ndarray:
        return (10000.0 ** (-np.arange(self.dim // 2) * 2 / self.dim)).astype(np.float32)


class Step:
    """The model on the GPU. Buffers are addresses; `new` returns an uninitialised one."""

    def __init__(self, gpu: Gpu, shape: Shape, embeddings: Matrix, output: Matrix, layers: list[dict], norms: list[int],
                 adapters: dict):
        self.gpu, self.shape = gpu, shape
        self.embeddings, self.output = embeddings, output
        self.layers, self.norms, self.adapters = layers, norms, adapters
        self.frequencies = shape.frequencies()
        self.with_adapter = True
        self.attention = AttentionKind(shape.n_head, shape.n_head_kv, shape.dim, 1 / math.sqrt(shape.dim), 0, None)

    def new(self, n: int) -> int:
        at = self.gpu.memory(4 * n)
        self.kept.append(at)
        return at

    def zeros(self, n: int) -> int:
        at = self.new(n)
        self.gpu.call("clear", 4 * n, at)
        return at

    def copied(self, x: int, n: int) -> int:
        at = self.new(n)
        self.gpu.call("copy", x, n, at)
        return at

    def multiply(self, m, n, k, ta, tb, alpha, beta, a, b, out):
        self.gpu.call("multiply", c.byref(Gemm(m, n, k, ta, tb, alpha, beta)), a, b, out)

    def norm(self, weight, x, n_rows):
        y = self.new(n_rows * self.shape.n_embd)
        self.gpu.call("norm", c.byref(NORM), x, weight, None, n_rows, self.shape.n_embd, y)
        return y

    def linear(self, il, name, x, n_rows):
        matrix, (n_out, n_in), rank = self.layers[il][name], self.shape.matrices()[name], self.shape.rank
        y, reduced = self.new(n_rows * n_out), self.new(n_rows * rank)
        self.gpu.product(matrix, x, n_rows, y)
        if not self.with_adapter:
            return y, reduced
        a, b = self.adapters[il, name][:2]
        self.multiply(n_rows, rank, n_in, 0, 1, 1.0, 0.0, x, a, reduced)
        self.multiply(n_rows, n_out, rank, 0, 1, self.shape.scale, 1.0, reduced, b, y)
        return y, reduced

    def linear_back(self, il, name, x, reduced, dy, n_rows, dx):
        matrix, (n_out, n_in), rank = self.layers[il][name], self.shape.matrices()[name], self.shape.rank
        a, b, da, db = self.adapters[il, name]
        self.gpu.call("product_back", c.byref(matrix), dy, n_rows, dx)
        self.multiply(n_out, rank, n_rows, 1, 0, self.shape.scale, 1.0, dy, reduced, db)
        dreduced = self.new(n_rows * rank)
        self.multiply(n_rows, rank, n_out, 0, 0, self.shape.scale, 0.0, dy, b, dreduced)
        self.multiply(rank, n_in, n_rows, 1, 0, 1.0, 1.0, dreduced, x, da)
        self.multiply(n_rows, n_in, rank, 0, 0, 1.0, 1.0, dreduced, a, dx)

    def rope(self, rows, heads, back, x):
        self.gpu.call("rope", rows, self.frequencies.ctypes.data, self.shape.dim // 2, 0, back, heads, self.shape.dim, x)

    def forward_layer(self, il, rows, n, x):
        shape, call = self.shape, self.gpu.call
        cache = {"x": x, "attn_in": self.norm(self.norms[2 * il], x, n)}
        for name in ("q", "k", "v"):
            cache[name], cache["r" + name] = self.linear(il, name, cache["attn_in"], n)
        self.rope(rows, shape.n_head, 0, cache["q"])
        self.rope(rows, shape.n_head_kv, 0, cache["k"])
        cache["out"], cache["lse"] = self.new(n * shape.n_embd), self.new(n * shape.n_head)
        call("attention", c.byref(self.attention), rows, cache["q"], cache["k"], cache["v"], cache["out"], cache["lse"])
        projected, cache["ro"] = self.linear(il, "o", cache["out"], n)
        y = self.copied(x, n * shape.n_embd)
        call("add", 1.0, projected, n * shape.n_embd, y)
        cache["middle"] = self.copied(y, n * shape.n_embd)
        cache["ffn_in"] = self.norm(self.norms[2 * il + 1], y, n)
        cache["gate"], cache["rgate"] = self.linear(il, "gate", cache["ffn_in"], n)
        cache["up"], cache["rup"] = self.linear(il, "up", cache["ffn_in"], n)
        cache["active"] = self.new(n * shape.n_ff)
        call("activate", 0, cache["gate"], cache["up"], n * shape.n_ff, cache["active"])
        projected, cache["rdown"] = self.linear(il, "down", cache["active"], n)
        call("add", 1.0, projected, n * shape.n_embd, y)
        return y, cache

    def backward_layer(self, il, rows, n, cache, dx):
        shape, call = self.shape, self.gpu.call
        dactive, dgate, dup = (self.zeros(n * shape.n_ff) for _ in range(3))
        dread = self.zeros(n * shape.n_embd)
        self.linear_back(il, "down", cache["active"], cache["rdown"], dx, n, dactive)
        call("activate_back", 0, cache["gate"], cache["up"], dactive, n * shape.n_ff, dgate, dup)
        self.linear_back(il, "gate", cache["ffn_in"], cache["rgate"], dgate, n, dread)
        self.linear_back(il, "up", cache["ffn_in"], cache["rup"], dup, n, dread)
        call("norm_back", c.byref(NORM), cache["middle"], self.norms[2 * il + 1], dread, n, shape.n_embd, dx, None, None)
        dout = self.zeros(n * shape.n_embd)
        self.linear_back(il, "o", cache["out"], cache["ro"], dx, n, dout)
        n_key = n * shape.n_head_kv * shape.dim
        dq, dk, dv, dattn = self.zeros(n * shape.n_embd), self.zeros(n_key), self.zeros(n_key), self.zeros(n * shape.n_embd)
        call("attention_back", c.byref(self.attention), rows, cache["q"], cache["k"], cache["v"], cache["out"],
             cache["lse"], dout, dq, dk, dv)
        self.rope(rows, shape.n_head, 1, dq)
        self.rope(rows, shape.n_head_kv, 1, dk)
        for name, dy in (("q", dq), ("k", dk), ("v", dv)):
            self.linear_back(il, name, cache["attn_in"], cache["r" + name], dy, n, dattn)
        call("norm_back", c.byref(NORM), cache["x"], self.norms[2 * il], dattn, n, shape.n_embd, dx, None, None)

    def logprobs(self, rows, x: int, first: int, count: int, gradient: bool, logps: int) -> int:
        """Writes the outputs' log-probabilities to `logps`. Returns the logits, or their gradients if `gradient`."""
        shape, gpu = self.shape, self.gpu
        picked, logits = self.new(count * shape.n_embd), self.new(count * shape.n_vocab)
        gpu.call("gather", x, shape.n_embd, OUTPUT, first, count, rows, 1.0, picked)
        normed = self.norm(self.norms[-1], picked, count)
        gpu.product(self.output, normed, count, logits)
        gpu.call("logprobs", rows, first, count, 1.0, shape.n_vocab, int(gradient), logits, logps + 4 * first)
        return logits

    def reference(self, packed: Packed) -> np.ndarray:
        """Each answer's log-probability without the adapter, `[2 pairs]`. Keeps no activations."""
        shape, gpu, self.kept, self.with_adapter = self.shape, self.gpu, [], False
        rows, n, n_outputs = gpu.rows(packed), len(packed.tokens), len(packed.output_rows)
        x = self.new(n * shape.n_embd)
        gpu.call("embed", c.byref(self.embeddings), rows, 1.0, x)
        for il in range(shape.n_layer):
            x, _ = self.forward_layer(il, rows, n, x)
            gpu.release(*(at for at in self.kept if at != x))
            self.kept = [x]
        logps = self.new(n_outputs)
        chunk = max(1, LOGIT_BYTES // (4 * shape.n_vocab))
        for first in range(0, n_outputs, chunk):
            count = min(chunk, n_outputs - first)
            self.logprobs(rows, x, first, count, False, logps)
        logps = gpu.read(logps, n_outputs)
        gpu.release(*self.kept)
        gpu.close_rows(rows)
        self.with_adapter = True
        return np.array([logps[a:b].sum(dtype=np.float64) for a, b in packed.answers])

    def gradient(self, packed: Packed, references: np.ndarray) -> tuple[float, np.ndarray]:
        """Accumulates the gradient of the mean loss. Returns the loss and each answer's log-probability, `[2 pairs]`."""
        shape, gpu, self.kept = self.shape, self.gpu, []
        rows, n, n_outputs = gpu.rows(packed), len(packed.tokens), len(packed.output_rows)
        x = self.new(n * shape.n_embd)
        gpu.call("embed", c.byref(self.embeddings), rows, 1.0, x)
        caches = []
        for il in range(shape.n_layer):
            x, cache = self.forward_layer(il, rows, n, x)
            caches.append(cache)
        logps, dlogps, head = self.new(n_outputs), self.new(n_outputs), self.zeros(n_outputs * shape.n_embd)
        chunk = max(1, LOGIT_BYTES // (4 * shape.n_vocab))
        for first in range(0, n_outputs, chunk):
            count = min(chunk, n_outputs - first)
            logits = self.logprobs(rows, x, first, count, True, logps)
            gpu.call("product_back", c.byref(self.output), logits, count, head + 4 * first * shape.n_embd)
            gpu.release(logits)
            self.kept.remove(logits)
        n_pairs = len(packed.answers) // 2
        preference = Preference(0, BETA, 0.0, n_pairs)
        costs, references = np.empty((n_pairs, len(PAIR_COST))), np.ascontiguousarray(references, dtype=np.float64)
        gpu.call("preference_loss", c.byref(preference), rows, references.ctypes.data, logps, dlogps, costs.ctypes.data)
        gpu.call("scale_rows", dlogps, n_outputs, shape.n_embd, head)
        picked, dpicked = self.new(n_outputs * shape.n_embd), self.zeros(n_outputs * shape.n_embd)
        gpu.call("gather", x, shape.n_embd, OUTPUT, 0, n_outputs, rows, 1.0, picked)
        gpu.call("norm_back", c.byref(NORM), picked, self.norms[-1], head, n_outputs, shape.n_embd, dpicked, None, None)
        dx = self.zeros(n * shape.n_embd)
        gpu.call("scatter_add", dpicked, shape.n_embd, OUTPUT, 0, n_outputs, rows, 1.0, dx)
        for il in reversed(range(shape.n_layer)):
            self.backward_layer(il, rows, n, caches[il], dx)
        gpu.release(*self.kept)
        gpu.close_rows(rows)
        return float(costs[:, 2].mean()), costs[:, :2].reshape(-1)

    def optimize(self, parameters, step: RmspropStep) -> float:
        """Takes an optimizer step and clears the gradients. Returns the sum of their squares."""
        total = c.c_double()
        gradients = (c.c_void_p * len(parameters))(*(p.gradient for p in parameters))
        lengths = np.array([p.n for p in parameters], dtype=np.int64)
        self.gpu.call("square_sum", gradients, lengths.ctypes.data, len(parameters), c.byref(total))
        self.gpu.call("rmsprop", c.byref(step), parameters, len(parameters))
        for p in parameters:
            self.gpu.call("clear", 4 * p.n, p.gradient)
        return total.value


def random_pairs(random: np.random.Generator, n: int, lengths: tuple[int, int, int], n_vocab: int) -> Packed:
    text = lambda length: [int(t) for t in random.integers(0, n_vocab, length)]  # noqa: E731
    return Packed([tuple(text(max(1, length - i % 3)) for length in lengths) for i in range(n)])


def f32_matrix(gpu: Gpu, w: np.ndarray) -> Matrix:
    return Matrix(0, w.shape[1], w.shape[0], gpu.array(w), None)


def adapters_on(gpu: Gpu, shape: Shape, a_of, b_of) -> tuple[dict, object]:
    """A, B and their gradients for every matrix, and the parameter list for the optimizer."""
    adapters, parameters = {}, []
    for il in range(shape.n_layer):
        for name, (n_out, n_in) in shape.matrices().items():
            a, b = gpu.array(a_of(il, name)), gpu.array(b_of(il, name))
            sizes = (shape.rank * n_in, n_out * shape.rank)
            gradients, states = ([gpu.array(np.zeros(n)) for n in sizes] for _ in range(2))
            adapters[il, name] = (a, b, *gradients)
            parameters += [Parameter(n, g, None, s, v) for n, g, s, v in zip(sizes, gradients, states, (a, b))]
    return adapters, (Parameter * len(parameters))(*parameters)


def torch_logps(shape: Shape, weights: dict, packed: Packed) -> torch.Tensor:
    """Each output's log-probability, `[outputs]`, computed in the weights' type on all packed rows at once."""
    positions = torch.tensor(packed.positions, dtype=torch.float64)
    mask, distance = torch.tensor(packed.sees()), positions[:, None] - positions[None, :]
    norm = lambda x, w: x / torch.sqrt((x ** 2).mean(-1, keepdim=True) + 1e-5) * w  # noqa: E731
    slopes, group, n = torch.zeros(shape.n_head, dtype=torch.float64), shape.n_head // shape.n_head_kv, len(packed.tokens)

    def linear(il, name, x):
        return x @ weights[il, name].T + shape.scale * (x @ weights[il, name, "a"].T) @ weights[il, name, "b"].T

    x = weights["embeddings"][packed.tokens]
    for il in range(shape.n_layer):
        h = norm(x, weights["norms"][2 * il])
        q, k, v = (linear(il, name, h).view(n, -1, shape.dim) for name in ("q", "k", "v"))
        q, k = (rotated(t, packed.positions, shape.frequencies(), False) for t in (q, k))
        out, _ = attended(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask, distance,
                          1 / math.sqrt(shape.dim), slopes)
        x = x + linear(il, "o", out.reshape(n, -1))
        h = norm(x, weights["norms"][2 * il + 1])
        x = x + linear(il, "down", torch.nn.functional.silu(linear(il, "gate", h)) * linear(il, "up", h))
    logits = norm(x[packed.output_rows], weights["norms"][-1]) @ weights["output"].T
    return torch.log_softmax(logits, -1)[range(len(packed.output_rows)), packed.output_tokens]


def check_step(gpu: Gpu, check: Checker, random: np.random.Generator) -> None:
    shape = Shape(n_layer=3, n_embd=64, n_head=4, n_head_kv=2, n_ff=96, n_vocab=120, rank=4)
    packed = random_pairs(random, 3, (9, 12, 7), shape.n_vocab)
    make = lambda *size: (random.standard_normal(size) / math.sqrt(size[-1])).astype(np.float32)  # noqa: E731
    host = {"embeddings": make(shape.n_vocab, shape.n_embd) * 8, "output": make(shape.n_vocab, shape.n_embd)}
    norms = [1 + 0.1 * random.standard_normal(shape.n_embd).astype(np.float32) for _ in range(2 * shape.n_layer + 1)]
    for il in range(shape.n_layer):
        for name, (n_out, n_in) in shape.matrices().items():
            host[il, name] = make(n_out, n_in)
            host[il, name, "a"], host[il, name, "b"] = make(shape.rank, n_in), 0.3 * make(n_out, shape.rank)
    adapters, parameters = adapters_on(gpu, shape, lambda *at: host[*at, "a"], lambda *at: host[*at, "b"])
    layers = [{name: f32_matrix(gpu, host[il, name]) for name in shape.matrices()} for il in range(shape.n_layer)]
    step = Step(gpu, shape, f32_matrix(gpu, host["embeddings"]), f32_matrix(gpu, host["output"]), layers,
                [gpu.array(w) for w in norms], adapters)
    references = np.full(len(packed.answers), -40.0) + random.standard_normal(len(packed.answers))
    loss, answers = step.gradient(packed, references)

    weights = {key: torch.tensor(w, dtype=torch.float64, requires_grad=key[-1] in ("a", "b")) for key, w in host.items()}
    weights["norms"] = [torch.tensor(w, dtype=torch.float64) for w in norms]
    logps = torch_logps(shape, weights, packed)
    expected = torch.stack([logps[a:b].sum() for a, b in packed.answers])
    margins = (expected - torch.tensor(references)).view(-1, 2)
    expected_loss = -torch.nn.functional.logsigmoid(BETA * (margins[:, 0] - margins[:, 1])).mean()
    expected_loss.backward()
    # bf16 shifts a logit by some thousandths of the size of its summands, and an answer has about ten tokens.
    check.close("step: log-probabilities", answers, expected.detach(), "", 0.3, sums=0.0 + 1e-9)
    check.close("step: loss", np.array([loss]), [float(expected_loss)], "", 0.05)
    every = torch.cat([weights[key].grad.flatten() for key in weights if key[-1] in ("a", "b")]).norm()
    for il in range(shape.n_layer):
        for name, (n_out, n_in) in shape.matrices().items():
            for at, which, size in ((2, "a", (shape.rank, n_in)), (3, "b", (n_out, shape.rank))):
                expected = weights[il, name, which].grad
                found = torch.tensor(gpu.read(adapters[il, name][at], *size), dtype=torch.float64)
                distance = float((found - expected).norm() / max(float(expected.norm()), 0.01 * float(every)))
                # Relative to the gradient's norm. Each product on the way has an error of up to 1/256 of its operands.
                check.close("step: gradients", np.array([distance]), [0.0], f"{name}.{which} of block {il}", 0.08, sums=1e-9)
    squares = step.optimize(parameters, RmspropStep(1e-3, 0.99, 1e-8, 1.0))
    check.close("step: gradient norm", np.array([math.sqrt(squares)]), [float(every)], "", 0.04 * float(every))
    values = gpu.read(adapters[0, "q"][0], shape.rank, shape.n_embd)
    check.close("step: finite", np.isfinite(values).astype(np.float64), np.ones(values.shape), "")
