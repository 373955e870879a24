"""Ten steps of TRL's own DPOTrainer with PEFT on a tiny model, and the same steps again in float64.

TRL runs as a user would run it, in float32 with padding. The token ids are taken from the batches it makes. The second
run does not use TRL: it takes the token ids, the initial adapter and the settings, and follows the recipe by hand on
the GGUF's tensors. If both give the same numbers, the recipe below is what TRL does; their difference is the
tolerance for a third program.

What TRL 0.25.1 does:
- It tokenises prompt and answers separately, without <s>, and appends </s> to each answer. (Here the text of a prompt
  begins with <s> if the model expects it.)
- The loss is the mean over the pairs of a batch of -log sigmoid(beta h), with h from log-probs summed over an answer.
- The logged gradient norm covers all adapter tensors together, before clipping. Clipping multiplies by
  max_grad_norm / (norm + 1e-6) if that is below 1.
- RMSprop is torch's: v = 0.99 v + 0.01 g^2 from v = 0, then w -= learning_rate * g / (sqrt(v) + 1e-8). No momentum.
- Warm-up: step i (from 0) trains at learning_rate * min(1, i / warmup_steps), so the first step changes nothing.
"""

import tempfile

import numpy as np
import torch
from tokenizers import Tokenizer

from . import golden, gguf_order, preference, tokenizer, train_golden, weights
from .gguf_order import GgufModel

STEPS, BATCH = 10, 2
LEARNING_RATE, WARMUP_STEPS = 1e-3, 3
RMSPROP = {"alpha": 0.99, "eps": 1e-8}
# By model; the default is the paper's 10. These values clip only some of the steps, because RMSprop would cancel a
# factor that all steps share.
MAX_GRAD_NORM = {"gemma3": 4.0, "bloom": 3.0}
# Answers in the first group of languages are chosen, in the second rejected: a difference that ten steps can learn.
CHOSEN_LANGUAGES = ["en", "de", "es", "fr", "id", "it", "nl"]
REJECTED_LANGUAGES = ["pl", "cs", "ru"]


def texts(arch) -> list[dict]:
    """Pairs of texts. The prompt is the first two words of a sentence, chosen is its rest, and rejected is the rest of
    a sentence in another language."""
    bos = tokenizer.BOS if arch.add_bos else ""
    rows = []
    for i, language in enumerate(CHOSEN_LANGUAGES):
        wrong = tokenizer.CORPUS[REJECTED_LANGUAGES[i % len(REJECTED_LANGUAGES)]]
        for sentence, other in zip(tokenizer.CORPUS[language][:3], wrong):
            start, end = _halves(sentence)
            rows.append({"prompt": bos + start, "chosen": end, "rejected": _halves(other)[1]})
    return rows[: STEPS * BATCH]


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split(" ")
    return " ".join(words[:2]), " " + " ".join(words[2:])


def make(arch, tok: Tokenizer, base: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """The golden's `trl` group and its tensors `trl_init/…` (A; B is zero) and `trl_final/…`."""
    model = GgufModel(arch, tok, base, torch.float32)  # only for names and orders
    max_grad_norm = MAX_GRAD_NORM.get(arch.name, 10.0)
    start = {name: value for name, value in train_golden.adapter(arch, base, train_golden.linears(base)).items()
             if name.endswith(".lora_a")}
    steps, final = _trl(arch, tok, model, start, max_grad_norm)
    with gguf_order.precision(torch.float64):
        exact_steps, exact_final = _by_hand(GgufModel(arch, tok, base, torch.float64), start, steps, max_grad_norm)
    clipped = [step["grad_norm"] > max_grad_norm for step in steps]
    assert arch.name not in MAX_GRAD_NORM or any(clipped) and not all(clipped), f"{arch.name}: clipped {clipped}"
    content = {
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARMUP_STEPS,
        "optim": "rmsprop",
        **{f"rmsprop_{name}": value for name, value in RMSPROP.items()},
        "max_grad_norm": max_grad_norm,
        "batch_size": BATCH,
        "beta": train_golden.BETA,
        "rank": train_golden.RANK,
        "alpha": train_golden.ALPHA,
        # From the run in float64, with the largest absolute difference of any step or tensor.
        "float64": {"losses": [step["loss"] for step in exact_steps],
                    "grad_norms": [step["grad_norm"] for step in exact_steps],
                    "differs_by": _differences(steps, final, exact_steps, exact_final)},
    }
    tensors = {f"trl_init/{name}": value for name, value in start.items()}
    return content, tensors | {f"trl_final/{name}": value for name, value in final.items()}


def _trl(arch, tok: Tokenizer, model: GgufModel, start: dict[str, np.ndarray],
         max_grad_norm: float) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Runs TRL. Returns each step's batch and numbers, and the final adapter in GGUF order."""
    # Imported here, because the import is slow and the other goldens do not need it.
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    steps = []

    class Recorded(DPOTrainer):
        """Records the trainer's intermediate values without changing them."""

        def dpo_loss(self, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *args, **kwargs):
            steps[-1] |= {
                "policy_chosen_logps": _floats(chosen_logps),
                "policy_rejected_logps": _floats(rejected_logps),
                "reference_chosen_logps": _floats(ref_chosen_logps),
                "reference_rejected_logps": _floats(ref_rejected_logps),
            }
            return super().dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *args, **kwargs)

        def get_batch_loss_metrics(self, model, batch, train_eval="train"):
            unpadded = {side: [ids[mask.bool()].tolist() for ids, mask in
                               zip(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"])]
                        for side in ("prompt", "chosen", "rejected")}
            steps.append({"pairs": [dict(zip(unpadded, pair)) for pair in zip(*unpadded.values())]})
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
            steps[-1] |= {"loss": _float(loss)} | {key: _float(value) for key, value in metrics.items()
                                                   if not key.startswith("logits/")}
            return loss, metrics

    class LearningRate(TrainerCallback):
        """Records the learning rate that a step uses. The trainer's log may already show the next one."""

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            steps[-1]["learning_rate"] = optimizer.param_groups[0]["lr"]

    hf_model = arch.build(tok.get_vocab_size())
    weights.fill(hf_model, arch)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token=tokenizer.UNK, bos_token=tokenizer.BOS, eos_token=tokenizer.EOS, pad_token=tokenizer.PAD)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=LEARNING_RATE,
            beta=train_golden.BETA, optim="rmsprop", lr_scheduler_type="constant_with_warmup", warmup_steps=WARMUP_STEPS,
            max_grad_norm=max_grad_norm, logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0,
            dataloader_pin_memory=False)
        lora = LoraConfig(
            r=train_golden.RANK, lora_alpha=train_golden.ALPHA, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
            fan_in_fan_out=arch.transposed_matrices,
            target_modules=sorted({model.module(name).rpartition(".")[2] for name in train_golden.linears(model.base)}))
        trainer = Recorded(model=hf_model, args=args, train_dataset=Dataset.from_list(texts(arch)),
                           processing_class=fast, peft_config=lora, callbacks=[LearningRate()])
        trainer.remove_callback(PrinterCallback)  # the log is also in `trainer.state`
        adapters = {name: trainer.model.get_submodule(f"base_model.model.{model.module(name)}")
                    for name in train_golden.linears(model.base)}
        n_trained = sum(param.requires_grad for param in trainer.model.parameters())
        assert n_trained == 2 * len(adapters), f"{arch.name}: {n_trained} tensors are trained"
        with torch.no_grad():
            for name, module in adapters.items():
                module.lora_A["default"].weight.copy_(torch.from_numpy(start[f"{name}.lora_a"]))
                assert not module.lora_B["default"].weight.any()
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == len(logged) == STEPS
    for step, entry in zip(steps, logged):
        step["grad_norm"] = _float(entry["grad_norm"])
    final = {}
    for name, module in adapters.items():
        final[f"{name}.lora_a"] = module.lora_A["default"].weight.detach().numpy()
        # Rows of B are outputs: put them into the file's order. No input of these matrices is reordered.
        final[f"{name}.lora_b"] = module.lora_B["default"].weight.detach().numpy()[model.rows(name)]
    return steps, final


def _by_hand(model: GgufModel, start: dict[str, np.ndarray], steps: list[dict],
             max_grad_norm: float) -> tuple[list[dict], dict[str, np.ndarray]]:
    leaves = {}
    for name, a in start.items():
        base = name.removesuffix(".lora_a")
        leaves[name] = model.leaf(a)
        leaves[f"{base}.lora_b"] = model.leaf(np.zeros((model.base[base].shape[0], train_golden.RANK)))
    squares = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    result = []
    for i, step in enumerate(steps):
        with torch.no_grad():
            reference = train_golden.logps(model, model.base, step["pairs"])
        policy = train_golden.logps(model, train_golden.adapted(model.base, leaves), step["pairs"])
        loss = preference.losses(policy, reference, train_golden.BETA,
                                 train_golden.lengths(step["pairs"], model.dtype))["sigmoid"].mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, leaves.values())))
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt().item()
        clip = min(1.0, max_grad_norm / (norm + 1e-6))
        rate = LEARNING_RATE * min(1.0, i / WARMUP_STEPS)
        with torch.no_grad():
            for name, leaf in leaves.items():
                gradient = gradients[name] * clip
                squares[name] = RMSPROP["alpha"] * squares[name] + (1 - RMSPROP["alpha"]) * gradient.square()
                leaf -= rate * gradient / (squares[name].sqrt() + RMSPROP["eps"])
        result.append({"loss": _float(loss), "grad_norm": _float(norm), "learning_rate": rate})
    return result, {name: leaf.detach().numpy() for name, leaf in leaves.items()}


def _differences(steps, final, exact_steps, exact_final) -> dict[str, float]:
    result = {key: max(abs(a[key] - b[key]) for a, b in zip(steps, exact_steps))
              for key in ("loss", "grad_norm", "learning_rate")}
    by_tensor = [np.abs(final[name] - exact_final[name]) for name in final]
    # RMSprop divides each gradient by its own size, so an element whose gradient is only rounding error moves as far as
    # any other. A few elements may therefore differ by much more than most.
    result["final_largest"] = float(max(values.max() for values in by_tensor))
    result["final_mean"] = float(np.concatenate([values.flatten() for values in by_tensor]).mean())
    return {name: float(f"{value:.2g}") for name, value in result.items()}


def _float(value) -> float:
    return float(f"{float(value):.9g}")


def _floats(values: torch.Tensor) -> list[float]:
    return golden.significant(values.detach().numpy(), 9)
