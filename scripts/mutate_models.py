#!/usr/bin/env python3
"""Damages a model in every way this script knows, one at a time, and runs detox-gguf on each copy.

    scripts/mutate_models.py [--program target/release/detox-gguf] [MODEL.gguf …]

Each number, text and list in the metadata is set to 0, 1, an odd number, a huge one, NaN, another type and so on, and
is left out. Each tensor gets another type or shape, is left out, or is renamed. Then the program generates one token.

A copy may run (exit 0) or be refused (exit 1 with a message). Anything else is printed: a signal, an abort, a panic,
or a run of more than `--timeout` seconds. The exit code is 1 if there was one. With `--unnamed`, refusals that do not
name the key or tensor are printed too; some are right, since a fault can show in another place.

`--as xverse` renames the architecture first: the tiny llama also runs as mistral3, xverse, smollm3 and others.

The default models are gguf/tiny/*.gguf. Their keys do not cover everything, so keys that llama.cpp reads for these
architectures are added (`EXTRA_KEYS`). `--sample N --seed S` runs a random part.
"""

import argparse
import collections
import copy
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gguf_bytes import ARR, BLOCKS, BOOL, F32, F64, FORMATS, I32, I64, STR, U8, U32, U64, Gguf, n_bytes

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 14 << 30
INTEGERS = [0, 1, 2, 3, 5, 7, 8, 9, 12, 16, 31, 33, 64, 128, 512, 513, 1000, 65536, 2**20, 2**30, 2**31 - 1, 2**31, 2**32 - 1]
FLOATS = [0.0, -1.0, 1e-45, 0.5, 2.0, 1e38, -1e38, float("nan"), float("inf"), float("-inf")]
TEXTS = [b"", b"none", b"llama", b"gpt2", b"bert", b"t5", b"rwkv", b"plamo2", b"default", b"gpt-2", b"yarn", b"longrope",
         b"linear", b"\xff\xfe", b"x" * 70_000, b"nul\0nul"]
# Keys without the architecture, which many models have and the tiny ones do not.
EXTRA_KEYS = """
attention.key_length attention.value_length attention.key_length_swa attention.value_length_swa
attention.head_count attention.head_count_kv attention.sliding_window attention.sliding_window_pattern
attention.scale attention.clamp_kqv attention.max_alibi_bias attention.causal attention.layer_norm_epsilon
attention.layer_norm_rms_epsilon attention.group_norm_epsilon attention.group_norm_groups attention.output_scale
attention.temperature_length attention.temperature_scale attention.shared_kv_layers attention.recurrent_layers
attn_logit_softcapping final_logit_softcapping router_logit_softcapping
rope.dimension_count rope.dimension_count_swa rope.dimension_sections rope.freq_base rope.freq_base_swa
rope.scale_linear rope.scaling.type rope.scaling.factor rope.scaling.attn_factor rope.scaling.alpha
rope.scaling.original_context_length rope.scaling.yarn_log_multiplier rope.scaling.yarn_ext_factor
rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.finetuned
embedding_length_out embedding_scale residual_scale logit_scale vocab_size pooling_type classifier.output_labels
expert_count expert_used_count expert_group_count expert_group_used_count expert_shared_count
expert_feed_forward_length expert_shared_feed_forward_length expert_weights_scale expert_weights_norm
expert_gating_func moe_every_n_layers nextn_predict_layers leading_dense_block_count interleave_moe_layer_step
ssm.conv_kernel ssm.inner_size ssm.state_size ssm.time_step_rank ssm.group_count ssm.dt_b_c_rms
use_parallel_residual decoder_start_token_id decoder_block_count swin_norm dense_2_feat_out dense_3_feat_in
wkv.head_size token_shift_count rescale_every_n_layers time_mix_extra_dim time_decay_extra_dim
""".split()
EXTRA_TOKENIZER_KEYS = """
tokenizer.ggml.scores tokenizer.ggml.token_type tokenizer.ggml.merges tokenizer.ggml.token_type_count
tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id tokenizer.ggml.eom_token_id
tokenizer.ggml.unknown_token_id tokenizer.ggml.seperator_token_id tokenizer.ggml.padding_token_id
tokenizer.ggml.cls_token_id tokenizer.ggml.mask_token_id tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token
tokenizer.ggml.add_sep_token tokenizer.ggml.add_space_prefix tokenizer.ggml.remove_extra_whitespaces
tokenizer.ggml.precompiled_charsmap tokenizer.ggml.fim_pre_token_id tokenizer.ggml.fim_suf_token_id
tokenizer.ggml.prefix_token_id tokenizer.ggml.suffix_token_id tokenizer.ggml.middle_token_id
tokenizer.ggml.suppress_tokens tokenizer.ggml.eog_token_ids tokenizer.ggml.pre tokenizer.ggml.normalizer.lowercase
tokenizer.chat_template general.alignment general.file_type general.quantization_version general.name general.type
split.no split.count split.tensors.count
""".split()


def numbers() -> list:
    """One value of every integer and float, each under the type that most keys have."""
    return [(U32, v) for v in INTEGERS] + [(F32, v) for v in FLOATS]


def values(old) -> list:
    """Other values for a key. `old` is (type, value), or None for a key that the model does not have."""
    others = [(BOOL, True), (BOOL, False), (STR, b"text"), (U8, 3), (U64, 4), (I64, -4), (F64, 1.5), (I32, -1), (I32, 4),
              (ARR, (U32, [])), (ARR, (U32, [0, 4])), (ARR, (I32, [4, 0])), (ARR, (U32, [4] * 4)), (ARR, (I32, [-1] * 4)),
              (ARR, (I32, [2**31 - 1] * 2)), (ARR, (F32, [0.5, float("nan")])), (ARR, (BOOL, [True, False])),
              (ARR, (U32, [4] * 600)), (ARR, (STR, [b"a", b"b"]))]
    kind, value = old or (None, None)
    if kind == STR:
        return [(STR, text) for text in TEXTS] + others
    if kind == BOOL:
        return [(BOOL, not value), (U32, 1)] + others
    if kind == ARR:
        element, items = value
        lists = [[], items[:1], items[:-1], items + items[-1:], items[::-1], items * 2]
        if element in (U32, I32):
            for n in (0, 1, 2, 3, 6, 7, 99, 2**31 - 1):
                lists += [[n] * len(items), items[:-1] + [n]]
            lists += [[-1] * len(items)] if element == I32 else []
        if element == STR:
            lists += [[b""] * len(items), [b"a"] * len(items), items[:-1] + [b"\xe6\xbc"], items[:-1] + [b""],
                      items[:-1] + [b"a b c"], [b" "] * len(items), items[:-1] + [b"x" * 5000]]
        if element == F32:
            lists += [[float("nan")] * len(items), [0.0] * len(items), [float("inf")] * len(items)]
        as_other = [(ARR, (F32, [1.0] * len(items))), (ARR, (I32, [1] * len(items))), (ARR, (STR, [b"a b"] * len(items)))]
        return [(ARR, (element, items)) for items in lists] + as_other + others
    found = numbers() + others
    if kind == U32:
        found += [(U32, v) for v in (value - 1, value + 1, value * 2, value // 2) if 0 <= v < 2**32]
        found.append((I32, value if value < 2**31 else -1))
    return found


def shown(value) -> str:
    if value is None:
        return "left out"
    kind, inner = value
    names = {STR: "str", ARR: "arr", U32: "u32", F32: "f32", I32: "i32", BOOL: "bool"}
    text = repr(inner)
    return f"{names.get(kind, kind)} {text if len(text) < 60 else text[:60] + '…'}"


def key_mutations(model: Gguf):
    """(name, description, function that changes a copy)."""
    arch = model.keys[b"general.architecture"][1]
    keys = list(model.keys)
    keys += [k for k in (arch + b"." + extra.encode() for extra in EXTRA_KEYS) if k not in model.keys]
    keys += [k.encode() for k in EXTRA_TOKENIZER_KEYS if k.encode() not in model.keys]
    for key in keys:
        old = model.keys.get(key)
        for value in ([None] if old else []) + values(old):
            if value == old:
                continue

            def change(copy_: Gguf, key=key, value=value):
                if value is None:
                    del copy_.keys[key]
                else:
                    copy_.keys[key] = value
            yield key.decode(), shown(value), change


def tensor_mutations(model: Gguf):
    """(name, description, function that changes a copy)."""
    for i, tensor in enumerate(model.tensors):
        name = tensor.name.decode()

        def drop(copy_, i=i):
            del copy_.tensors[i]

        def rename(copy_, i=i):
            copy_.tensors[i].name = b"x" + copy_.tensors[i].name

        def twice(copy_, i=i):
            copy_.tensors.append(copy.copy(copy_.tensors[i]))
            copy_.tensors[-1].name = copy_.tensors[i].name.replace(b"blk.0", b"blk.7") + b".2"
        yield name, "left out", drop
        yield name, "renamed", rename
        yield name, "an extra tensor", twice
        for kind in BLOCKS:
            if kind != tensor.kind:
                def retype(copy_, i=i, kind=kind):
                    changed = copy_.tensors[i]
                    changed.kind, size = kind, n_bytes(changed.shape, kind)
                    changed.data = (changed.data * (size // max(1, len(changed.data)) + 1))[:size]
                yield name, f"type {kind}", retype
        shape = tensor.shape
        shapes = [shape[::-1], shape + [1], shape + [2], [1] + shape, [2] + shape, shape + [1, 1, 1], [shape[0] * 2] + shape[1:],
                  [shape[0] // 2] + shape[1:], shape[:-1] + [shape[-1] + 1], shape[:-1] + [shape[-1] - 1], shape[:1],
                  [n_elements(shape)], [1], shape[:-1] + [1], [0] + shape[1:], shape[:-1] + [2**40], [2**62, 4]]
        for new in shapes:
            if new != shape and 0 < len(new) <= 5:
                def reshape(copy_, i=i, new=new):
                    changed = copy_.tensors[i]
                    changed.shape, size = new, min(n_bytes(new, changed.kind), 1 << 24)
                    changed.data = (changed.data * (size // max(1, len(changed.data)) + 1))[:size]
                yield name, f"shape {new}", reshape


def rename(model: Gguf, arch: bytes) -> None:
    old = model.keys[b"general.architecture"][1] + b"."
    model.keys = {arch + b"." + key[len(old):] if key.startswith(old) else key: value
                  for key, value in model.keys.items()}
    model.keys[b"general.architecture"] = (STR, arch)


def n_elements(shape: list[int]) -> int:
    n = 1
    for ne in shape:
        n *= ne
    return n


def run(command: list[str], timeout: float) -> tuple[int | str, str, float]:
    """Exit code (or "hang"), the end of standard error, and seconds."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, preexec_fn=limit)
    except subprocess.TimeoutExpired:
        return "hang", "", timeout
    return done.returncode, done.stderr.decode(errors="replace"), time.monotonic() - began


def is_fault(code: int | str, stderr: str) -> bool:
    return code not in (0, 1, 2) or "panicked" in stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--program", default=ROOT / "target/release/detox-gguf", type=Path)
    parser.add_argument("--timeout", default=20.0, type=float, help="seconds for one run")
    parser.add_argument("--only", help="only keys and tensors whose name contains this")
    parser.add_argument("--sample", type=int, help="run only this many mutations of each model, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as", dest="arch", help="rename the architecture of every model first")
    parser.add_argument("--unnamed", action="store_true", help="also print refusals that do not name the key or tensor")
    options = parser.parse_args()
    models = options.models or sorted(p for p in (ROOT / "gguf/tiny").glob("*.gguf") if "-lora" not in p.name)
    counts, n_faults = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        prompts, mutant = Path(folder) / "en.txt", Path(folder) / "m.gguf"
        prompts.write_text("The weather\n")
        command = [str(options.program), "generate", "-m", str(mutant), "--lang", "en", "--prompts", str(prompts),
                   "-k", "1", "-n", "1", "-t", "1"]
        for path in models:
            model = Gguf(path)
            if options.arch:
                rename(model, options.arch.encode())
            mutations = [*key_mutations(model), *tensor_mutations(model)]
            mutations = [m for m in mutations if not options.only or options.only in m[0]]
            if options.sample:
                mutations = random.Random(options.seed).sample(mutations, min(options.sample, len(mutations)))
            for name, what, change in mutations:
                changed = copy.copy(model)
                changed.keys, changed.tensors = dict(model.keys), [copy.copy(t) for t in model.tensors]
                change(changed)
                changed.write(mutant)
                code, stderr, seconds = run(command, options.timeout)
                line = next((l for l in stderr.splitlines() if "error" in l or "ASSERT" in l), "")[-240:]
                if is_fault(code, stderr):
                    n_faults += 1
                    print(f"{path.stem}: {name}: {what}: exit {code}: {line}", flush=True)
                elif options.unnamed and code != 0 and name not in stderr:
                    print(f"{path.stem}: {name}: {what}: unnamed: {line}", flush=True)
                counts["fault" if is_fault(code, stderr) else "runs" if code == 0 else "refused"] += 1
    print(f"{sum(counts.values())} mutants: {dict(counts)}", file=sys.stderr)
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
