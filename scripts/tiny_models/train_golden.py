"""Golden numbers of one DPO step: losses and gradients, by PyTorch's autograd in float64.

Each answer is a separate forward pass over prompt + answer. Padding, packing, caching and shared prompts are avoided,
so that an error in such an optimisation of the tested program cannot also occur here. Everything is computed in
float32 too; the difference is the tolerance needed for float32's rounding and order of summation.
"""

import zlib

import numpy as np
import torch
from tokenizers import Tokenizer

from . import golden, gguf_order, preference, tokenizer
from .gguf_order import GgufModel, Tensors

BETA = 0.1
RANK = 4
ALPHA = 8.0
# With alpha / rank = 2 and unit gain of A, the adapter changes a matrix by a tenth to a fifth of its size.
B_STD = 0.05
# (prompt, chosen, rejected, answers end with </s>)
PAIRS = [
    ("The cat sleeps", " in the house.", " on the warm roof, and we like the tea in the morning.", True),
    # The prompt is cut to one token, which is <s> if the model expects it. The answers begin with the same tokens.
    ("Das", " Wetter ist heute schön.", " Wetter ist vandaag mooi in de stad.", False),
    # The chosen answer is cut to one token.
    ("Il gatto dorme", " nella", " casa, e il tè è buono", False),
    ("오늘 도시의 날씨가 좋습니다. Сегодня", " в городе хорошая погода.", " 猫在家里睡觉。", True),
]
# For `full` and `vector`: offsets added to the base's log-probs to get the reference's, so that the two differ.
CHOSEN_OFFSETS = [-1.5, 0.7, 2.0, -0.25]
REJECTED_OFFSETS = [1.0, -2.0, 0.5, 4.0]
# Tolerance of the gradient along a random direction against the central difference, both in float64.
MAX_FINITE_DIFFERENCE = 1e-6


def pairs(arch, tok: Tokenizer) -> list[dict]:
    """The texts of PAIRS as token ids. Prompt and answers are tokenised separately and joined."""
    result = []
    for i, (prompt, chosen, rejected, ends) in enumerate(PAIRS):
        end = [tok.token_to_id(tokenizer.EOS)] * ends
        ids = {
            "prompt": tokenizer.encode(tok, prompt, arch.add_bos),
            "chosen": tokenizer.encode(tok, chosen, False) + end,
            "rejected": tokenizer.encode(tok, rejected, False) + end,
        }
        if i == 1:
            ids["prompt"] = ids["prompt"][:1]
            assert ids["chosen"][0] == ids["rejected"][0] and ids["chosen"] != ids["rejected"]
        if i == 2:
            ids["chosen"] = ids["chosen"][:1]
        result.append(ids)
    return result


def linears(base: dict[str, np.ndarray]) -> list[str]:
    """Every matrix of every block."""
    return [name for name, value in base.items() if name.startswith("blk.") and value.ndim == 2]


def adapter(arch, base: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """`{name}.lora_a` and `{name}.lora_b`: random, not zero, shaped as in the adapter GGUF (slowest axis first)."""
    result = {}
    for name in names:
        n_out, n_in = base[name].shape
        if name == "token_embd.weight":  # row t of A belongs to token t, whose embedding gains B a[t]
            shapes = {"lora_a": ((n_out, RANK), 1.0), "lora_b": ((n_in, RANK), 0.1 * arch.embd_std)}
        else:
            shapes = {"lora_a": ((RANK, n_in), n_in**-0.5), "lora_b": ((n_out, RANK), B_STD)}
        for part, (shape, std) in shapes.items():
            rng = np.random.default_rng([arch.seed, zlib.crc32(f"train {name}.{part}".encode())])
            result[f"{name}.{part}"] = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
    return result


def adapted(base: Tensors, lora: Tensors) -> Tensors:
    """W + alpha / rank * B A, and for the token embedding W + alpha / rank * A B^T."""
    result = dict(base)
    for name in {key.rpartition(".")[0] for key in lora}:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        change = a @ b.T if name == "token_embd.weight" else b @ a
        result[name] = base[name] + ALPHA / RANK * change
    return result


def logps(model: GgufModel, tensors: Tensors, some_pairs: list[dict],
          directions: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs of the chosen and of the rejected answers, each [n_pairs]."""
    def of(prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model.forward(tensors, prompt + answer, directions)
        # Row i of the logits predicts token i + 1.
        rows = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        return rows.gather(1, torch.tensor(answer)[:, None]).sum()
    return tuple(torch.stack([of(pair["prompt"], pair[side]) for pair in some_pairs]) for side in ("chosen", "rejected"))


def lengths(some_pairs: list[dict], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Token counts of the chosen and the rejected answers, each [n_pairs]."""
    return tuple(torch.tensor([len(pair[side]) for pair in some_pairs], dtype=dtype) for side in ("chosen", "rejected"))


class Run:
    """Everything in one precision: `scalars` by group, `tensors` by name."""

    def __init__(self, arch, tok: Tokenizer, base: dict[str, np.ndarray], dtype: torch.dtype):
        self.pairs = pairs(arch, tok)
        self.scalars: dict[str, dict] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.model = GgufModel(arch, tok, base, dtype)
        with torch.no_grad():
            self.base_logps = logps(self.model, self.model.base, self.pairs)
        self._hidden()
        self._lora("lora", "grad", adapter(arch, base, linears(base)))
        if "output.weight" in base and arch.quantization is None and arch.arch == "llama":
            names = [*linears(base), "token_embd.weight", "output.weight"]
            self._lora("lora_embeddings", "grad_embd", adapter(arch, base, names))
        if arch.quantization is None:
            self._full()
        self._vector()

    def _hidden(self) -> None:
        pair = self.pairs[0]
        for side in ("chosen", "rejected"):
            record = []
            with torch.no_grad():
                logits = self.model.forward(self.model.base, pair["prompt"] + pair[side], record=record)
            for il, stream in enumerate(record):
                self._keep(f"hidden/{side}/{il}", stream)
            self._keep(f"logits/{side}", logits[len(pair["prompt"]) - 1 : -1])

    def _lora(self, group: str, prefix: str, values: dict[str, np.ndarray]) -> None:
        leaves = {name: self.model.leaf(value) for name, value in values.items()}

        def loss(leaves: Tensors):
            policy = logps(self.model, adapted(self.model.base, leaves), self.pairs)
            return self._loss(policy, self.base_logps), policy

        self._differentiate(group, prefix, leaves, loss, self.base_logps)
        for name, value in values.items():
            self.tensors[name] = value

    def _full(self) -> None:
        leaves = {name: self.model.leaf(value) for name, value in self.model.base.items()}
        reference = self._moved_reference()

        def loss(leaves: Tensors):
            policy = logps(self.model, leaves, self.pairs)
            return self._loss(policy, reference), policy

        self._differentiate("full", "full", leaves, loss, reference)

    def _vector(self) -> None:
        n_layer, n_embd = self.model.arch.metadata["block_count"], self.model.arch.metadata["embedding_length"]
        leaves = {str(il): self.model.leaf(np.zeros(n_embd)) for il in range(n_layer)}
        reference = self._moved_reference()

        def loss(leaves: Tensors):
            policy = logps(self.model, self.model.base, self.pairs, [leaves[str(il)] for il in range(n_layer)])
            return self._loss(policy, reference), policy

        self._differentiate("vector", "dir", leaves, loss, reference)

    def _loss(self, policy, reference) -> torch.Tensor:
        return preference.losses(policy, reference, BETA, lengths(self.pairs, self.model.dtype))["sigmoid"].mean()

    def _moved_reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(logps + torch.tensor(offsets, dtype=self.model.dtype)
                     for logps, offsets in zip(self.base_logps, (CHOSEN_OFFSETS, REJECTED_OFFSETS)))

    def _differentiate(self, group: str, prefix: str, leaves: Tensors, loss, reference) -> None:
        value, policy = loss(leaves)
        gradients = dict(zip(leaves, torch.autograd.grad(value, leaves.values())))
        for name, gradient in gradients.items():
            self._keep(f"{prefix}/{name}", gradient)
            assert gradient.abs().max() > 0, f"{group}: the gradient of {name} is zero"
        if self.model.dtype == torch.float64:
            _check_slope(group, leaves, gradients, lambda leaves: loss(leaves)[0])
        policy = tuple(logps.detach() for logps in policy)
        self.scalars[group] = self._scalars(policy, reference)

    def _scalars(self, policy, reference) -> dict:
        by_pair = preference.losses(policy, reference, BETA, lengths(self.pairs, self.model.dtype))
        chosen, rejected = preference.rewards(policy, reference, BETA)
        scalars = {
            "policy_chosen_logps": policy[0],
            "policy_rejected_logps": policy[1],
            "reference_chosen_logps": reference[0],
            "reference_rejected_logps": reference[1],
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "margins": chosen - rejected,
            "losses": by_pair,
            "loss": {name: value.mean() for name, value in by_pair.items()},
            # Derivatives of the mean loss by the log-prob of each chosen answer. Those by the rejected answers are the
            # negatives, except for ipo_mean.
            "slopes": {},
        }
        for name in by_pair:
            leaf = policy[0].clone().requires_grad_()
            mean = preference.losses((leaf, policy[1]), reference, BETA, lengths(self.pairs, self.model.dtype))[name].mean()
            scalars["slopes"][name] = torch.autograd.grad(mean, leaf)[0]
        return scalars

    def _keep(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name] = value.detach().numpy()


def _check_slope(group: str, leaves: Tensors, gradients: Tensors, loss) -> None:
    """Checks the gradient along a random direction against the loss's central difference."""
    random = np.random.default_rng(0)
    directions = {name: torch.from_numpy(random.standard_normal(tuple(leaf.shape))) * (leaf.std(correction=0) + 0.01)
                  for name, leaf in leaves.items()}
    slope = sum((gradients[name] * directions[name]).sum() for name in leaves).item()
    step = 1e-5
    with torch.no_grad():
        after, before = (loss({name: leaf + sign * step * directions[name] for name, leaf in leaves.items()}).item()
                         for sign in (1, -1))
    difference = abs((after - before) / (2 * step) - slope)
    assert difference <= MAX_FINITE_DIFFERENCE * max(1.0, abs(slope)), f"{group}: slope {slope}, off by {difference}"


def make(arch, tok: Tokenizer, base: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """The golden's scalars and tensors in float64, and the differences of float32."""
    runs = {}
    for dtype in (torch.float64, torch.float32):
        with gguf_order.precision(dtype):
            runs[dtype] = Run(arch, tok, base, dtype)
    exact, rounded = runs[torch.float64], runs[torch.float32]
    n_layer = arch.metadata["block_count"]
    content = {
        "seed": arch.seed,
        "model": f"gguf/tiny/{arch.name}.gguf",
        "architecture": arch.arch,
        "n_layer": n_layer,
        "n_embd": arch.metadata["embedding_length"],
        "add_bos": arch.add_bos,
        "beta": BETA,
        "label_smoothing": preference.LABEL_SMOOTHING,
        "formulas": preference.FORMULAS,
        "rank": RANK,
        "alpha": ALPHA,
        "linears": linears(base),
        "pairs": exact.pairs,
        "base": {"chosen_logps": _numbers(exact.base_logps[0]), "rejected_logps": _numbers(exact.base_logps[1])},
        "reference_offsets": {"chosen": CHOSEN_OFFSETS, "rejected": REJECTED_OFFSETS},
    }
    content |= {group: _numbers(scalars) for group, scalars in exact.scalars.items()}
    content["float32_differs_by"] = _differences(exact, rounded)
    return content, {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in exact.tensors.items()}


def _differences(exact: Run, rounded: Run) -> dict:
    """The largest difference of each quantity: absolute for log-probs, relative for losses above 1, and relative to the
    largest value for tensors."""
    result = {"logps": float(max((a - b).abs().max() for a, b in zip(exact.base_logps, rounded.base_logps)))}
    for group, scalars in exact.scalars.items():
        pairs_of = lambda key: (scalars[key], rounded.scalars[group][key])
        result[f"{group}/logps"] = max(float((a - b).abs().max()) for a, b in map(
            pairs_of, ("policy_chosen_logps", "policy_rejected_logps")))
        a, b = pairs_of("loss")
        result[f"{group}/loss"] = max(float(abs(a[name] - b[name]) / max(1.0, a[name])) for name in a)
    for name, value in exact.tensors.items():
        kind = name.partition("/")[0]
        if "/" not in name:
            continue  # the adapter itself
        difference = float(np.abs(value - rounded.tensors[name]).max() / np.abs(value).max())
        result[kind] = max(result.get(kind, 0.0), difference)
    return {name: float(f"{value:.2g}") for name, value in result.items()}


def _numbers(value):
    """Converts torch numbers for JSON, with 12 significant digits."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return golden.significant(np.atleast_1d(value.numpy()), 12) if value.ndim else float(f"{value.item():.12g}")
