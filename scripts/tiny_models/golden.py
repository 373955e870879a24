"""Golden numbers, computed by PyTorch from the same weights, in F32 on the CPU."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from . import interventions, lora, tokenizer

PROMPTS = ["The cat sleeps", "Das Wetter ist", "猫在家"]
# (prompt, continuation): the model scores the continuation's tokens given the prompt.
CONTINUATIONS = [
    ("The cat sleeps", " in the house."),
    ("Il gatto dorme", " nella casa."),
    ("오늘", " 날씨가"),
]
# 3, 8 and 13 tokens without <s>, so that texts in the same batch end at different steps.
SENTENCES = ["Kočka", "The cat sleeps", "Kami suka minum teh di"]
N_GREEDY = 8
# Greedy decoding is only a useful test if rounding cannot change it: at every step the best token must lead the second
# by this much. That is ten times the error of an F16 KV cache. Products with Q8_0 weights round the activations to 8
# bits and change logits by 0.2, so there a test should check `greedy_leads` and stop at a small one.
MIN_GREEDY_LEAD = 0.1
# Largest difference in a golden file due to the order of summation.
CPU_TOLERANCE = 1e-4

# Texts that are error-prone for tokenizers: white space, marks, digits, joined emoji, contractions, control tokens.
TOKENIZER_CASES = [
    "",
    " ",
    "  two  spaces   three",
    "line\nbreak\r\n\n\ttab ",
    "It's true that they're here, I'm sure we'll see.",
    "12 3456 7.89 ½ ٣",
    "naïve café — “quoted” …!?",
    "👩‍👩‍👧 🙂",
    "हिन्दी में",
    "e\u0301 is not \u00e9",
    "no\u00a0break\u3000ideographic",
    "<s> is text here</s>",
    "<unk><pad>",
]


def model_goldens(arch, model: torch.nn.Module, tok: Tokenizer) -> tuple[dict, dict]:
    """The two golden files of a model: logits and log-probs, and activations of the first prompt."""
    torch.set_num_threads(1)  # one order of summation
    torch.use_deterministic_algorithms(True)
    config = model.config
    head = {
        "generator": generator(),
        "seed": arch.seed,
        "model": f"gguf/tiny/{arch.name}.gguf",
        "architecture": arch.arch,
    }
    sizes = {
        "n_vocab": config.vocab_size,
        "n_layer": arch.metadata["block_count"],
        "n_embd": arch.metadata["embedding_length"],
        "n_ff": arch.metadata["feed_forward_length"],
        "n_head": arch.metadata["attention.head_count"],
        "n_head_kv": arch.metadata.get("attention.head_count_kv", arch.metadata["attention.head_count"]),
        "n_ctx": arch.metadata["context_length"],
        "add_bos": arch.add_bos,
    }

    prompts = []
    for text in PROMPTS:
        tokens = tokenizer.encode(tok, text, arch.add_bos)
        greedy, leads = _greedy(model, tokens)
        where = f"{arch.name}, {text!r}"
        assert min(leads) >= MIN_GREEDY_LEAD, f"{where}: greedy lead of only {min(leads):.3f}; use another seed"
        assert tok.token_to_id(tokenizer.EOS) not in greedy, f"{where}: ends early; use another seed"
        prompts.append({
            "text": text,
            "tokens": tokens,
            "greedy": greedy,
            "greedy_leads": significant(np.array(leads), 7),
            "logits": _shortest(_logits(model, tokens)),
        })

    continuations = []
    for text, continuation in CONTINUATIONS:
        # Tokenised separately and joined, as in a program that keeps the prompt in its cache.
        tokens = tokenizer.encode(tok, text, arch.add_bos)
        continuation_tokens = tokenizer.encode(tok, continuation, add_bos=False)
        logits = torch.from_numpy(_logits(model, tokens + continuation_tokens)).double()
        # Row i of the logits predicts token i + 1.
        rows = torch.log_softmax(logits[len(tokens) - 1 : -1], dim=-1)
        logps = [row[token].item() for row, token in zip(rows, continuation_tokens)]
        continuations.append({
            "prompt": text,
            "prompt_tokens": tokens,
            "continuation": continuation,
            "continuation_tokens": continuation_tokens,
            "logps": significant(np.array(logps), 9),
        })

    residual_stream, neuron_activations = _activations(arch, model, prompts[0]["tokens"])
    logits_golden = head | sizes | {"prompts": prompts, "continuations": continuations}
    activations_golden = head | sizes | {
        "prompt": {"text": prompts[0]["text"], "tokens": prompts[0]["tokens"]},
        # [n_layer][n_tokens][n_embd]: the residual stream after each block.
        "residual_stream": significant(residual_stream, 7),
        # [n_layer][n_tokens][n_ff]: the input of each block's down projection.
        "neuron_activations": significant(neuron_activations, 7),
    }
    return logits_golden, activations_golden


def intervention_golden(arch, model: torch.nn.Module, tok: Tokenizer) -> dict:
    """Logits under interventions, mean residual streams of sentences, and mean activations of neurons."""
    n_layer, n_ff = arch.metadata["block_count"], arch.metadata["feed_forward_length"]
    n_embd = arch.metadata["embedding_length"]
    tokens = tokenizer.encode(tok, PROMPTS[0] + CONTINUATIONS[0][1], arch.add_bos)
    plain = _logits(model, tokens)
    found = []
    for name, edits in interventions.cases(n_layer, n_ff, n_embd).items():
        logits = interventions.logits(arch, model, tokens, edits)
        effect = float(np.abs(logits - plain).max())
        assert effect >= interventions.MIN_EFFECT, f"{arch.name}, {name}: moves no logit by more than {effect:.3f}"
        # Only the last tokens: they depend on the edits at all earlier ones.
        last = significant(logits[-interventions.N_ROWS :], 6)
        found.append({"name": name, "edits": edits, "largest_effect": effect, "last_logits": last})
    texts = [tokenizer.encode(tok, text, arch.add_bos) for text in interventions.TEXTS]
    neurons = [[0, 1], [0, n_ff - 1], [n_layer - 1, 0], [n_layer - 1, 33], [n_layer // 2, 5], [0, 2]]
    activations = []
    for text in texts:
        greedy, leads, mean = interventions.greedy_activations(arch, model, text, neurons)
        activations.append({"greedy": greedy, "greedy_leads": significant(np.array(leads), 7), "mean": significant(mean, 7)})
    return {
        "generator": generator(),
        "seed": arch.seed,
        "model": f"gguf/tiny/{arch.name}.gguf",
        "architecture": arch.arch,
        "tokens": tokens,
        "cases": found,
        "texts": texts,
        # [n_texts][n_layer + 1][n_embd]
        "sentence_vectors": [significant(interventions.sentence_vectors(model, text), 7) for text in texts],
        "neurons": neurons,
        "activations": activations,
    }


def sentence_golden(arch, model: torch.nn.Module, tok: Tokenizer) -> dict:
    """Mean residual streams of texts, and mean activations of neurons during greedy decoding."""
    n_layer, n_ff = arch.metadata["block_count"], arch.metadata["feed_forward_length"]
    # Includes the first and the last neuron of a layer, and neurons of several layers.
    neurons = [[0, 0], [0, n_ff - 1], [0, 31], [n_layer // 2, 64], [n_layer - 1, 1], [n_layer - 1, n_ff - 2]]
    texts = [{"text": text, "tokens": tokenizer.encode(tok, text, arch.add_bos)} for text in SENTENCES]
    activations = []
    for text in texts:
        # Decoding does not stop at the end-of-text token.
        greedy, leads, mean = interventions.greedy_activations(arch, model, text["tokens"], neurons)
        where = f"{arch.name}, {text['text']!r}"
        assert min(leads) >= MIN_GREEDY_LEAD, f"{where}: greedy lead of only {min(leads):.3f}; use another text"
        # Means over the last token of the prompt and the first four greedy tokens.
        activations.append(text | {
            "greedy": greedy,
            "greedy_leads": significant(np.array(leads), 7),
            "mean": significant(mean, 7),
        })
    return {
        "generator": generator(),
        "seed": arch.seed,
        "model": f"gguf/tiny/{arch.name}.gguf",
        "architecture": arch.arch,
        "texts": texts,
        # [n_texts][n_layer + 1][n_embd], means over all tokens including <s>. The same for every architecture: entry 0
        # is the first block's input (gemma3's scaled embeddings, bloom's after their norm, gpt2's with positions
        # added), the last entry is after the final norm, and the last block's own output is not included.
        "residual_stream_mean": [
            significant(interventions.sentence_vectors(model, text["tokens"]), 7) for text in texts],
        "neurons": neurons,
        "activations": activations,
    }


def lora_golden(arch, model: torch.nn.Module, tok: Tokenizer) -> dict:
    """Logits with the adapter of lora.py in the weights, with and without an intervention."""
    last, n_ff = arch.metadata["block_count"] - 1, arch.metadata["feed_forward_length"]
    text = PROMPTS[0]
    tokens = tokenizer.encode(tok, text, arch.add_bos)
    plain = _logits(model, tokens)
    offsets = [interventions.neuron(last, i, offset=2.0) for i in (4, n_ff - 3)]
    cases = []
    for name, scale, edits in [("scale 1", 1.0, []), ("scale -0.5", -0.5, []), ("scale 1 with offsets", 1.0, offsets)]:
        with lora.applied(arch, model, scale):
            adapted = _logits(model, tokens)
            logits = interventions.logits(arch, model, tokens, edits)
        effect = float(np.abs(logits - plain).max())
        # Both the adapter and the edits must have a visible effect.
        for part in [effect] + [float(np.abs(logits - adapted).max())] * bool(edits):
            assert part >= interventions.MIN_EFFECT, f"{arch.name}, {name}: moves no logit by more than {part:.3f}"
        cases.append({
            "name": name,
            "scale": scale,
            "edits": edits,
            "largest_effect": effect,
            "logits": significant(logits, 7),
        })
    assert np.array_equal(plain, _logits(model, tokens)), f"{arch.name}: removing the adapter did not restore the weights"
    return {
        "generator": generator(),
        "seed": arch.seed,
        "model": f"gguf/tiny/{arch.name}.gguf",
        "architecture": arch.arch,
        "adapter": f"gguf/tiny/{arch.name}-lora.gguf",
        "rank": lora.RANK,
        "alpha": lora.ALPHA,
        "prompt": {"text": text, "tokens": tokens},
        "cases": cases,
    }


def tokenizer_golden(tok: Tokenizer) -> dict:
    """Token ids, without <s>, of every sentence of the corpus and of the error-prone texts."""
    texts = [sentence for sentences in tokenizer.CORPUS.values() for sentence in sentences] + TOKENIZER_CASES
    return {
        "generator": generator(),
        "tokenizer": "gguf/tiny/tokenizer.json",
        "control_tokens": {token: tok.token_to_id(token) for token in tokenizer.CONTROL_TOKENS},
        # Control tokens in the text are recognised, as in llama_tokenize with parse_special.
        "cases": [{"text": text, "tokens": tokenizer.encode(tok, text, add_bos=False)} for text in texts],
    }


def summary(arch, golden: dict) -> str:
    """A one-line summary, to check that a model's logits are worth comparing."""
    logits = np.array([row for prompt in golden["prompts"] for row in prompt["logits"]])
    return (
        f"{arch.name:10s} logits std {logits.std():.2f}, range {logits.min():.1f} to {logits.max():.1f}; "
        f"greedy lead {min(min(p['greedy_leads']) for p in golden['prompts']):.2f}; "
        f"tokens {[len(p['tokens']) for p in golden['prompts']]}; "
        f"greedy {[p['greedy'] for p in golden['prompts']]}"
    )


def generator() -> dict[str, str]:
    """The script and versions that made a golden file. Omits patch levels and build tags, which affect no number."""
    python = ".".join(platform.python_version_tuple()[:2])
    packages = ["torch", "transformers", "gguf", "tokenizers", "numpy"]
    return {"script": "scripts/make_tiny_models.py", "python": python} | {p: version(p).split("+")[0] for p in packages}


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits [n_tokens, n_vocab]."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def _greedy(model: torch.nn.Module, tokens: list[int]) -> tuple[list[int], list[float]]:
    """Decodes N_GREEDY tokens greedily. Returns them and each token's lead over the second best.

    Uses no KV cache: slower, but free of cache bugs.
    """
    tokens, n_prompt, leads = list(tokens), len(tokens), []
    for _ in range(N_GREEDY):
        last = _logits(model, tokens)[-1]
        second, best = np.argsort(last, kind="stable")[-2:]
        leads.append(float(last[best] - last[second]))
        tokens.append(int(best))
    return tokens[n_prompt:], leads


@torch.no_grad()
def _activations(arch, model: torch.nn.Module, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Residual stream after each block, and input of each down projection."""
    residual_stream, neuron_activations = [], []
    handles = []
    for block in model.get_submodule(arch.blocks):
        # Some blocks return the residual stream, others a tuple that starts with it.
        handles.append(block.register_forward_hook(
            lambda _module, _args, out: residual_stream.append((out[0] if isinstance(out, tuple) else out)[0].clone())))
        handles.append(block.get_submodule(arch.down).register_forward_pre_hook(
            lambda _module, args: neuron_activations.append(args[0][0].clone())))
    _logits(model, tokens)
    for handle in handles:
        handle.remove()
    return torch.stack(residual_stream).numpy(), torch.stack(neuron_activations).numpy()


def _shortest(values: np.ndarray):
    """Nested lists of the shortest decimals that parse to the same F32."""
    if values.ndim > 1:
        return [_shortest(row) for row in values]
    return [float(str(value)) for value in values.astype(np.float32)]


def significant(values: np.ndarray, digits: int):
    """Nested lists, rounded to `digits` significant digits."""
    if values.ndim > 1:
        return [significant(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") for value in values]


def largest_difference(old: Path, new: Path) -> float:
    """The largest difference between numbers of two golden files. Infinite if anything but a float differs."""
    return _difference(json.loads(old.read_text(encoding="utf-8")), json.loads(new.read_text(encoding="utf-8")))


def _difference(a, b) -> float:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b)
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return max((_difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max((_difference(x, y) for x, y in zip(a, b)), default=0.0)
    return 0.0 if a == b else float("inf")


def write_json(path: Path, content: dict) -> None:
    """Writes JSON with each list of numbers on one line, so that diffs stay short."""
    path.write_text(_format(content, "") + "\n", encoding="utf-8")


def _format(value, indent: str) -> str:
    inner = indent + " "
    match value:
        case dict() if value:
            items = [f"{json.dumps(key)}: {_format(item, inner)}" for key, item in value.items()]
            return "{\n" + ",\n".join(inner + item for item in items) + f"\n{indent}}}"
        case list() if value and isinstance(value[0], (dict, list)):
            return "[\n" + ",\n".join(inner + _format(item, inner) for item in value) + f"\n{indent}]"
        case list():
            return json.dumps(value, separators=(",", ":"))
        case _:
            return json.dumps(value, ensure_ascii=False)
