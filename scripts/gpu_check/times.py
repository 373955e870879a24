"""Times a step of DPO on a model of Llama-3-8B's shape, and the same step in PyTorch in bf16.

Both compute the reference in every step. PyTorch gets batches as TRL builds them: chosen and rejected texts, each with
its prompt, padded to one length. If transformers and peft are installed, their Llama is timed too.
"""

from __future__ import annotations

import gc
import math
import statistics
import time

import numpy as np
import torch

from .blocks import TYPES, random_blocks
from .library import Gpu, Matrix, Packed, RmspropStep
from .step import BETA, Shape, Step, adapters_on, random_pairs

LLAMA_3_8B = dict(n_embd=4096, n_head=32, n_head_kv=8, n_ff=14336, n_vocab=128256, rank=64)
LAYERS = 32
# Number of pairs, and tokens of (prompt, chosen, rejected).
BATCHES = ((4, (32, 48, 48)), (8, (64, 128, 128)))
STEPS = 5


def filled(gpu: Gpu, data: np.ndarray, n_bytes: int) -> int:
    """`n_bytes` bytes that repeat `data`: random enough for timing, and quick to write."""
    at = gpu.memory(n_bytes)
    for first in range(0, n_bytes, data.nbytes):
        n = min(data.nbytes, n_bytes - first)
        gpu.call("write", data.ctypes.data, n, at + first)
    return at


def model(gpu: Gpu, shape: Shape, quantised: bool, random: np.random.Generator) -> tuple[Step, object]:
    name = "Q4_K" if quantised else "BF16"
    number, length, n_bytes, _ = TYPES[name]
    # About as large as trained weights, so that nothing overflows after several layers.
    if quantised:
        data = random_blocks(name, 256 * 4096, random)
    else:
        values = (random.standard_normal(1 << 20) / math.sqrt(shape.n_embd)).astype(np.float32)
        data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)

    def matrix(n_out: int, n_in: int, is_table: bool = False) -> Matrix:
        at = filled(gpu, data, n_out * n_in // length * n_bytes)
        return Matrix(number, n_in, n_out, at if quantised or is_table else None, None if quantised else at)

    layers = [{name: matrix(*size) for name, size in shape.matrices().items()} for _ in range(shape.n_layer)]
    norms = [gpu.array(np.ones(shape.n_embd)) for _ in range(2 * shape.n_layer + 1)]
    small = lambda *size: (random.standard_normal(size) * 0.01).astype(np.float32)  # noqa: E731
    sizes = shape.matrices()
    adapters, parameters = adapters_on(gpu, shape, lambda il, name: small(shape.rank, sizes[name][1]),
                                       lambda il, name: small(sizes[name][0], shape.rank))
    table = matrix(shape.n_vocab, shape.n_embd, is_table=True)
    return Step(gpu, shape, table, matrix(shape.n_vocab, shape.n_embd), layers, norms, adapters), parameters


def our_times(gpu: Gpu, shape: Shape, quantised: bool, batches, n_steps: int = STEPS):
    """Yields for each batch the median seconds of the reference, the gradient and the optimizer."""
    random = np.random.default_rng(3)
    step, parameters = model(gpu, shape, quantised, random)
    for n_pairs, lengths in batches:
        packed = random_pairs(random, n_pairs, lengths, shape.n_vocab)
        parts = {"reference": [], "gradient": [], "optimizer": []}
        for i in range(n_steps + 2):
            marks = [time.perf_counter()]

            def mark():
                gpu.wait()
                marks.append(time.perf_counter())

            references = step.reference(packed)
            mark()
            loss, _ = step.gradient(packed, references)
            mark()
            squares = step.optimize(parameters, RmspropStep(1e-6, 0.99, 1e-8, 1.0))
            mark()
            if not (math.isfinite(loss) and math.isfinite(squares)):
                raise RuntimeError(f"a step is not finite: loss {loss}, sum of squared gradients {squares}")
            if i >= 2:
                for part, first, last in zip(parts, marks, marks[1:]):
                    parts[part].append(last - first)
        result = {part: statistics.median(seconds) for part, seconds in parts.items()}
        result["rows"] = len(packed.tokens)
        result["outputs"] = len(packed.output_rows)
        yield result


class TorchModel(torch.nn.Module):
    """The same model as a PyTorch user would write it: fused attention, LoRA as two extra linear layers."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype):
        super().__init__()
        self.shape = shape
        weight = lambda *size: torch.randn(*size, device=device, dtype=dtype) / math.sqrt(size[-1])  # noqa: E731
        self.embeddings, self.output = weight(shape.n_vocab, shape.n_embd), weight(shape.n_vocab, shape.n_embd)
        self.frozen = [{n: weight(*s) for n, s in shape.matrices().items()} for _ in range(shape.n_layer)]
        self.norms = [torch.ones(shape.n_embd, device=device, dtype=dtype) for _ in range(2 * shape.n_layer + 1)]
        self.adapters = torch.nn.ParameterDict()
        for il in range(shape.n_layer):
            for name, (n_out, n_in) in shape.matrices().items():
                self.adapters[f"{il}{name}a"] = torch.nn.Parameter(0.01 * weight(shape.rank, n_in))
                self.adapters[f"{il}{name}b"] = torch.nn.Parameter(0.01 * weight(n_out, shape.rank))

    def linear(self, il, name, x, with_adapter):
        y = torch.nn.functional.linear(x, self.frozen[il][name])
        if with_adapter:
            a, b = self.adapters[f"{il}{name}a"], self.adapters[f"{il}{name}b"]
            y = y + self.shape.scale * torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
        return y

    def norm(self, x, i):
        return torch.nn.functional.rms_norm(x, (self.shape.n_embd,), self.norms[i], 1e-5)

    def forward(self, tokens, with_adapter):
        shape = self.shape
        n_texts, n = tokens.shape
        x = self.embeddings[tokens]
        angles = torch.arange(n, device=tokens.device)[:, None] * torch.tensor(shape.frequencies(), device=tokens.device)
        cosine, sine = (f(angles).to(x.dtype)[None, :, None, :] for f in (torch.cos, torch.sin))

        def turned(t):
            a, b = t[..., 0::2], t[..., 1::2]
            return torch.stack((a * cosine - b * sine, a * sine + b * cosine), -1).flatten(-2)

        for il in range(shape.n_layer):
            h = self.norm(x, 2 * il)
            q, k, v = (self.linear(il, m, h, with_adapter).view(n_texts, n, -1, shape.dim) for m in ("q", "k", "v"))
            q, k = turned(q), turned(k)
            group = shape.n_head // shape.n_head_kv
            q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.linear(il, "o", out.transpose(1, 2).reshape(n_texts, n, -1), with_adapter)
            h = self.norm(x, 2 * il + 1)
            inner = torch.nn.functional.silu(self.linear(il, "gate", h, with_adapter)) * self.linear(il, "up", h, with_adapter)
            x = x + self.linear(il, "down", inner, with_adapter)
        return torch.nn.functional.linear(self.norm(x, -1), self.output)


def padded(packed: Packed, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Each answer with its prompt, `[2 pairs][longest]`, and a mask of the predicted tokens."""
    texts, starts = [], []
    for first, end in packed.answers:
        row = packed.output_rows[first]
        prompt_first = row - packed.positions[row]
        texts.append(packed.tokens[prompt_first:row + 1] + packed.output_tokens[first:end])
        starts.append(row + 1 - prompt_first)
    longest = max(map(len, texts))
    tokens, counts = torch.zeros(len(texts), longest, dtype=torch.long), torch.zeros(len(texts), longest, dtype=torch.bool)
    for i, (text, start) in enumerate(zip(texts, starts)):
        tokens[i, :len(text)] = torch.tensor(text)
        counts[i, start:len(text)] = True
    # Chosen answers first, as in TRL.
    order = [*range(0, len(texts), 2), *range(1, len(texts), 2)]
    return tokens[order].to(device), counts[order].to(device)


def torch_times(forward, parameters, packed: Packed, device: str, n_steps: int = STEPS) -> float:
    """Median seconds of a step: reference, policy, backward and RMSprop."""
    tokens, counts = padded(packed, device)
    optimizer = torch.optim.RMSprop(parameters, lr=1e-6, foreach=True)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def logps(with_adapter):
        logits = forward(tokens, with_adapter)[:, :-1].float()
        of_tokens = torch.gather(logits.log_softmax(-1), 2, tokens[:, 1:, None]).squeeze(-1)
        return (of_tokens * counts[:, 1:]).sum(-1)

    seconds = []
    for i in range(n_steps + 2):
        started = time.perf_counter()
        with torch.no_grad():
            reference = logps(False)
        chosen, rejected = (logps(True) - reference).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad()
        wait()
        if i >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def plain_model(shape: Shape):
    made = TorchModel(shape, "cuda", torch.bfloat16)
    return (made, list(made.parameters())), ""


def peft_model(shape: Shape):
    """transformers' Llama with peft's LoRA, or None and the reason why it is unavailable."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        return None, str(error)
    config = LlamaConfig(
        vocab_size=shape.n_vocab, hidden_size=shape.n_embd, intermediate_size=shape.n_ff, num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head, num_key_value_heads=shape.n_head_kv)
    with torch.device("cuda"):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            base = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(previous)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = get_peft_model(base, LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=targets))

    def forward(tokens, with_adapter):
        if with_adapter:
            return made(tokens).logits
        with made.disable_adapter():
            return made(tokens).logits

    return (forward, [p for p in made.parameters() if p.requires_grad]), ""


def matrix_rate() -> float:
    """FLOP/s that the GPU reaches in PyTorch, with a bf16 product of 8192 by 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    rate = 20 * 2 * 8192 ** 3 / (time.perf_counter() - started)
    del a, b
    torch.cuda.empty_cache()
    return rate


def products_of(shape: Shape, rows: int, outputs: int) -> float:
    """FLOP of a step's products with frozen matrices: reference, forward, and gradients of the inputs."""
    of_block = sum(n_out * n_in for n_out, n_in in shape.matrices().values())
    return 3 * 2 * (rows * shape.n_layer * of_block + outputs * shape.n_vocab * shape.n_embd)


def report(gpu: Gpu, n_layer: int) -> None:
    if not torch.cuda.is_available():
        print("no times: PyTorch finds no GPU")
        return
    shape = Shape(n_layer=n_layer, **LLAMA_3_8B)
    rate = matrix_rate()
    print(f"\nLlama-3-8B's shape, {n_layer} of {LAYERS} layers, rank {shape.rank}; the GPU multiplies bf16 matrices at "
          f"{rate / 1e12:.0f} TFLOP/s in PyTorch")
    print(f"{'program':<28}{'pairs':>6}{'tokens':>8}{'ms/step':>10}{'pairs/s':>9}{'rate':>7}  parts")
    packed_of = [random_pairs(np.random.default_rng(3), n, lengths, shape.n_vocab) for n, lengths in BATCHES]

    def line(program, n_pairs, rows, outputs, seconds, parts=""):
        share = products_of(shape, rows, outputs) / seconds / rate
        print(f"{program:<28}{n_pairs:>6}{rows:>8}{1e3 * seconds:>10.1f}{n_pairs / seconds:>9.2f}{share:>7.0%}  {parts}",
              flush=True)

    # Programs run one at a time. If one runs out of memory, the next is still timed.
    for quantised in (False, True):
        program, before = f"ours, {'quantised' if quantised else 'bf16'}", gpu.free_bytes()
        try:
            with gpu.scope():
                for (n_pairs, _), result in zip(BATCHES, our_times(gpu, shape, quantised, BATCHES)):
                    parts = [(part, result[part]) for part in ("reference", "gradient", "optimizer")]
                    line(program, n_pairs, result["rows"], result["outputs"], sum(seconds for _, seconds in parts),
                         ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in parts))
                print(f"  {(before - gpu.free_bytes()) / 2 ** 30:.1f} GiB used")
        except RuntimeError as error:
            print(f"{program}: {error}")
    for program, make in (("PyTorch bf16", plain_model), ("transformers + peft bf16", peft_model)):
        torch_lines(program, make, shape, packed_of, line)
        gc.collect()
        torch.cuda.empty_cache()


def torch_lines(program: str, make, shape: Shape, packed_of: list[Packed], line) -> None:
    """Prints a line for each batch. The model is freed on return."""
    try:
        model_of, why = make(shape)
    except torch.cuda.OutOfMemoryError as error:
        model_of, why = None, str(error).splitlines()[0]
    if model_of is None:
        print(f"{program}: skipped ({why})")
        return
    for (n_pairs, _), packed in zip(BATCHES, packed_of):
        try:
            seconds = torch_times(*model_of, packed, "cuda")
        except torch.cuda.OutOfMemoryError as error:
            print(f"{program}, {n_pairs} pairs: {str(error).splitlines()[0]}")
            for parameter in model_of[1]:
                parameter.grad = None
            continue
        line(program, n_pairs, len(packed.tokens), len(packed.output_rows), seconds)
