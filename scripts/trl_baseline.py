#!/usr/bin/env python3
"""Runs DPO with a LoRA adapter in TRL and PEFT on the CPU, as the baseline for our trainer's speed.

    pip install -r scripts/requirements-train.txt
    scripts/trl_baseline.py convert MODEL.gguf FOLDER
    scripts/trl_baseline.py train FOLDER --pairs pairs.jsonl [--dtype bfloat16] [--steps 10]

transformers cannot train a GGUF, so `convert` first writes the dequantised weights as a Hugging Face folder. `train`
prints one line of JSON: seconds of each step, pairs per second, peak resident memory of the process, and the losses.
The settings are the paper's (rank 64, alpha 16, RMSprop, batch size 4, beta 0.1), without warm-up, which does not
affect speed. TRL computes the reference's log-probs in every step, as by default.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_WARMUP = 2  # first steps, whose time is not counted


def convert(path: Path, folder: Path) -> None:
    """Dequantise a GGUF into a float32 model with its tokenizer."""
    import gguf
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    # `loaded` remembers that it was quantised and refuses to train. A new model with the same config does not.
    config = loaded.config.__class__(**{key: value for key, value in loaded.config.to_dict().items()
                                        if key not in ("quantization_config", "dtype", "torch_dtype")})
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            values = gguf.dequantize(tensor.data[:64], tensor.tensor_type)
            found = plain.get_input_embeddings().weight[:64].detach().numpy()
            assert np.array_equal(values, found), f"{path}: transformers read weights that differ from the file's"
    plain.save_pretrained(folder)
    tok = AutoTokenizer.from_pretrained(**names)
    # Set these tokens explicitly: transformers 4.57.1 ignores the file's choice, and TRL ends every answer with eos.
    for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if field := reader.get_field(f"tokenizer.ggml.{key}_token_id"):
            setattr(tok, f"{kind}_token", tok.convert_ids_to_tokens(int(field.contents())))
    tok.save_pretrained(folder)


def train(args: argparse.Namespace) -> dict:
    """Train, discard the result, and return the times."""
    import torch
    import transformers
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)

    class Clock(TrainerCallback):
        """Wall time and CPU time of each step, from its first forward pass to its update."""

        def __init__(self):
            self.seconds, self.cpu_seconds = [], []

        def on_step_begin(self, *_args, **_kwargs):
            self.begin = time.perf_counter(), time.process_time()

        def on_step_end(self, *_args, **_kwargs):
            self.seconds.append(time.perf_counter() - self.begin[0])
            self.cpu_seconds.append(time.process_time() - self.begin[1])

    tok = AutoTokenizer.from_pretrained(args.folder)
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    lines = Path(args.pairs).read_text(encoding="utf-8").splitlines()
    rows = [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in map(json.loads, lines)]
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch, max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=1e-5,
            beta=0.1, optim="rmsprop", lr_scheduler_type="constant", max_grad_norm=10.0, max_prompt_length=64,
            max_length=256, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
            gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False, seed=args.seed)
        lora = LoraConfig(r=args.rank, lora_alpha=16, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
                          target_modules=TARGETS)
        trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tok,
                             peft_config=lora, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    step_seconds = statistics.median(clock.seconds[N_WARMUP:])
    return {
        "dtype": args.dtype,
        "pairs_per_second": args.batch_size / step_seconds,
        "median_step_seconds": step_seconds,
        "step_seconds": [round(seconds, 4) for seconds in clock.seconds],
        # With one thread, CPU time is a fair measure even on a busy machine. With several threads it includes the time
        # that they spin while waiting for each other.
        "median_step_cpu_seconds": statistics.median(clock.cpu_seconds[N_WARMUP:]),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    converting = commands.add_parser("convert", help="write a GGUF's weights as a Hugging Face folder")
    converting.add_argument("gguf", type=Path)
    converting.add_argument("folder", type=Path)
    training = commands.add_parser("train", help="train and print the times")
    training.add_argument("folder", type=Path)
    training.add_argument("--pairs", required=True)
    training.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    training.add_argument("--steps", type=int, default=10)
    training.add_argument("--batch-size", type=int, default=4)
    training.add_argument("--rank", type=int, default=64)
    training.add_argument("--threads", type=int, default=os.cpu_count())
    training.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "convert":
        convert(args.gguf, args.folder)
    elif args.steps <= N_WARMUP:
        sys.exit(f"error: --steps: expected more than {N_WARMUP}, found {args.steps}\n"
                 f"hint: the first {N_WARMUP} steps are not counted")
    else:
        print(json.dumps(train(args)))


if __name__ == "__main__":
    main()
