"""The architectures: each with its Hugging Face model, its GGUF tensors and its GGUF metadata.

Sizes (n_ff, n_head_kv, n_layer) differ between architectures, so that code fails if it mixes two of them
up or uses another model's size. All are multiples of 32, the block length of Q8_0 and Q4_0.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
import transformers as hf

N_CTX = 256
# Found by trying seeds from 1 upwards. With these, greedy decoding of the golden prompts has no near ties (golden.py
# checks this) and does not just repeat one token.
SEEDS = {"llama": 34, "command-r": 6, "gpt2": 46, "bloom": 63, "gemma3": 23, "qwen2": 1, "qwen3": 2, "bert": 1,
         "plamo2": 1}
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Architecture:
    """Everything needed to make one tiny model."""

    name: str  # file name without its extension
    arch: str  # general.architecture
    config: hf.PretrainedConfig
    model_class: type
    # Module names of the list of blocks, and of the down projection inside a block.
    blocks: str
    down: str
    tensors: Callable[[torch.nn.Module], Tensors]  # GGUF name -> F32 values, slowest axis first
    metadata: dict[str, int | float | bool | str | list[int]]  # keys without the prefix "{arch}."
    add_bos: bool
    # How the weights are drawn, see weights.py.
    seed: int
    embd_std: float  # standard deviation of the embeddings' values
    residual_gain: float = 1.0  # gain of the matrices that write to the residual stream
    output_norm_gain: float = 3.5  # sets the spread of the logits
    norm_offset: float = 0.0
    transposed_matrices: bool = False
    quantization: gguf.GGMLQuantizationType | None = None
    has_goldens: bool = True
    tokenizer_metadata: dict[str, int] = field(default_factory=dict)
    # Matrices of each block that get an adapter (see lora.py): module in the block -> GGUF name. Empty: no adapter.
    lora: dict[str, str] = field(default_factory=dict)

    def build(self, n_vocab: int) -> torch.nn.Module:
        """The model with transformers' initial weights, which weights.fill() overwrites."""
        self.config.vocab_size = n_vocab
        # Eager attention uses plain matrix products. Fused kernels sum in another order.
        self.config._attn_implementation = "eager"
        return self.model_class(self.config).eval()


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())


def _interleave_rope(w: torch.Tensor, n_head: int) -> torch.Tensor:
    """Reorder the rows of a q or k matrix for a rope on neighbouring pairs.

    transformers rotates element i of a head with element i + n/2. llama.cpp's `llama` graph rotates 2i
    with 2i + 1. So the two halves of each head become its even and odd rows.
    """
    n_out, n_in = w.shape
    return w.view(n_head, 2, n_out // n_head // 2, n_in).transpose(1, 2).reshape(n_out, n_in)


def _split_heads_qkv(w: torch.Tensor, n_head: int) -> torch.Tensor:
    """Reorder BLOOM's [n_head, (q, k, v), n_embd_head, ...] to [(q, k, v), n_head, n_embd_head, ...]."""
    return w.view(n_head, 3, w.shape[0] // n_head // 3, *w.shape[1:]).transpose(0, 1).reshape(w.shape)


def _rename(model: torch.nn.Module, outer: dict[str, str], block: str, inner: dict[str, str],
            change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, w: w) -> Tensors:
    """GGUF tensors of `model`, named by tables of module names. `change` maps (GGUF name, value) to the value to write.

    A parameter that no table names raises a KeyError, so that none is silently left out.
    """
    names = dict(outer)
    n_layer = len(model.get_submodule(block))
    for il in range(n_layer):
        names |= {f"{block}.{il}.{module}": f"blk.{il}.{name}" for module, name in inner.items()}
    result = {}
    for name, param in model.named_parameters():
        module, _, kind = name.rpartition(".")  # kind is "weight" or "bias"
        gguf_name = f"{names[module]}.{kind}"
        result[gguf_name] = _array(change(gguf_name, param))
    # Sort, so that the file does not depend on the order of the modules.
    return dict(sorted(result.items()))


# Names shared by llama, command-r, qwen2 and gemma3: gated FFN, and separate q, k, v.
GATED = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
GATED_LORA = {module: GATED[module] for module in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj")}
GATED_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _llama_tensors(model) -> Tensors:
    cfg = model.config

    def change(name: str, w: torch.Tensor) -> torch.Tensor:
        if ".attn_q." in name:
            return _interleave_rope(w, cfg.num_attention_heads)
        if ".attn_k." in name:
            return _interleave_rope(w, cfg.num_key_value_heads)
        return w

    return _rename(model, GATED_OUTER, "model.layers", GATED | {"post_attention_layernorm": "ffn_norm"}, change)


def _llama(name: str, quantization: gguf.GGMLQuantizationType | None = None) -> Architecture:
    return Architecture(
        name=name,
        arch="llama",
        lora={} if quantization else GATED_LORA,
        config=hf.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=N_CTX, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
        ),
        model_class=hf.LlamaForCausalLM,
        blocks="model.layers",
        down="mlp.down_proj",
        tensors=_llama_tensors,
        metadata={
            "context_length": N_CTX,
            "embedding_length": 64,
            "block_count": 3,
            "feed_forward_length": 96,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 16,
            "rope.freq_base": 10000.0,
        },
        add_bos=True,
        embd_std=1.0,
        residual_gain=1.5,
        output_norm_gain=2.8,
        quantization=quantization,
        seed=SEEDS["llama"],
    )


LLAMA = _llama("llama")
# The same random values as LLAMA, so that the two files differ only in quantisation.
LLAMA_Q8_0 = _llama("llama-q8_0", gguf.GGMLQuantizationType.Q8_0)

# A parallel block: attention and FFN both read the block's one norm, and both are added to the residual stream.
# Both transformers and llama.cpp rotate neighbouring pairs for this model, so nothing is reordered.
COMMAND_R = Architecture(
    name="command-r",
    arch="command-r",
    config=hf.CohereConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=N_CTX, layer_norm_eps=1e-5, rope_theta=10000.0, logit_scale=0.25, use_qk_norm=False,
        tie_word_embeddings=True,
    ),
    model_class=hf.CohereForCausalLM,
    blocks="model.layers",
    down="mlp.down_proj",
    tensors=lambda model: _rename(model, GATED_OUTER, "model.layers", GATED),
    metadata={
        "context_length": N_CTX,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_epsilon": 1e-5,
        "logit_scale": 0.25,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "none",
    },
    add_bos=True,
    embd_std=0.4,
    residual_gain=3.0,
    seed=SEEDS["command-r"],
)


def _gpt2_tensors(model) -> Tensors:
    outer = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}
    inner = {
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
    }
    # Only the blocks' matrices are Conv1D, [n_in, n_out], and must be transposed. The embeddings need no transpose.
    return _rename(model, outer, "transformer.h", inner,
                   lambda name, w: w.T if w.ndim == 2 and name.startswith("blk.") else w)


GPT2 = Architecture(
    name="gpt2",
    arch="gpt2",
    config=hf.GPT2Config(n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=N_CTX, layer_norm_epsilon=1e-5,
                         activation_function="gelu_new", bos_token_id=1, eos_token_id=2),
    model_class=hf.GPT2LMHeadModel,
    blocks="transformer.h",
    down="mlp.c_proj",
    tensors=_gpt2_tensors,
    metadata={
        "context_length": N_CTX,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
    },
    add_bos=False,
    embd_std=0.1,
    residual_gain=3.0,
    transposed_matrices=True,
    lora={"mlp.c_proj": "ffn_down", "mlp.c_fc": "ffn_up", "attn.c_proj": "attn_output"},
    seed=SEEDS["gpt2"],
)


def _bloom_tensors(model) -> Tensors:
    outer = {
        "transformer.word_embeddings": "token_embd",
        "transformer.word_embeddings_layernorm": "token_embd_norm",
        "transformer.ln_f": "output_norm",
    }
    inner = {
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    n_head = model.config.n_head
    return _rename(model, outer, "transformer.h", inner,
                   lambda name, w: _split_heads_qkv(w, n_head) if ".attn_qkv." in name else w)


# BLOOM encodes positions only by ALiBi. Its FFN is always 4 * n_embd wide.
BLOOM = Architecture(
    name="bloom",
    arch="bloom",
    config=hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, layer_norm_epsilon=1e-5, bos_token_id=1, eos_token_id=2),
    model_class=hf.BloomForCausalLM,
    blocks="transformer.h",
    down="mlp.dense_4h_to_h",
    tensors=_bloom_tensors,
    metadata={
        "context_length": N_CTX,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 4,
        "attention.layer_norm_epsilon": 1e-5,
    },
    add_bos=False,
    embd_std=0.1,
    residual_gain=5.0,
    seed=SEEDS["bloom"],
)


def _gemma3_tensors(model) -> Tensors:
    inner = GATED | {
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    # Gemma multiplies by 1 + w; llama.cpp multiplies by the stored gain, so store 1 + w.
    return _rename(model, GATED_OUTER, "model.layers", inner, lambda name, w: w + 1 if "norm" in name else w)


# Heads are wider than n_embd / n_head, there is one KV head, and a norm follows both the attention and the FFN.
# The sliding window is shorter than the golden prompts, so that local and global layers really differ.
GEMMA3 = Architecture(
    name="gemma3",
    arch="gemma3",
    config=hf.Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=N_CTX, rms_norm_eps=1e-6,
        rope_theta=1000000.0, rope_local_base_freq=10000.0,
        query_pre_attn_scalar=32, sliding_window=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    ),
    model_class=hf.Gemma3ForCausalLM,
    blocks="model.layers",
    down="mlp.down_proj",
    tensors=_gemma3_tensors,
    metadata={
        "context_length": N_CTX,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 4,
        "attention.sliding_window_pattern": 3,  # every third layer is global
        "rope.freq_base": 1000000.0,
        "rope.freq_base_swa": 10000.0,
    },
    add_bos=True,
    embd_std=0.05,
    output_norm_gain=7.0,
    norm_offset=1.0,
    lora=GATED_LORA,
    seed=SEEDS["gemma3"],
)

# q, k and v have biases. The rope rotates halves in both programs, so nothing is reordered.
QWEN2 = Architecture(
    name="qwen2",
    arch="qwen2",
    config=hf.Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=N_CTX, rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True,
    ),
    model_class=hf.Qwen2ForCausalLM,
    blocks="model.layers",
    down="mlp.down_proj",
    tensors=lambda model: _rename(model, GATED_OUTER, "model.layers", GATED | {"post_attention_layernorm": "ffn_norm"}),
    metadata={
        "context_length": N_CTX,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1000000.0,
    },
    add_bos=False,
    embd_std=0.1,
    residual_gain=2.0,
    seed=SEEDS["qwen2"],
)


# As qwen2, but with norms on q and k instead of biases, and with heads wider than n_embd / n_head.
QWEN3 = Architecture(
    name="qwen3",
    arch="qwen3",
    config=hf.Qwen3Config(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=N_CTX, rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=False,
    ),
    model_class=hf.Qwen3ForCausalLM,
    blocks="model.layers",
    down="mlp.down_proj",
    tensors=lambda model: _rename(model, GATED_OUTER, "model.layers", GATED | {
        "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}),
    metadata={
        "context_length": N_CTX,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1000000.0,
    },
    add_bos=False,
    embd_std=0.1,
    residual_gain=2.0,
    seed=SEEDS["qwen3"],
)


def _bert_tensors(model) -> Tensors:
    outer = {
        "embeddings.word_embeddings": "token_embd",
        "embeddings.position_embeddings": "position_embd",
        "embeddings.token_type_embeddings": "token_types",
        "embeddings.LayerNorm": "token_embd_norm",
    }
    inner = {
        "attention.self.query": "attn_q",
        "attention.self.key": "attn_k",
        "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output",
        "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up",
        "output.dense": "ffn_down",
        "output.LayerNorm": "layer_output_norm",
    }
    return _rename(model, outer, "encoder.layer", inner)


# An encoder, for the test that models other than decoders are refused. It has no goldens.
BERT = Architecture(
    name="bert",
    arch="bert",
    config=hf.BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=N_CTX, type_vocab_size=2, layer_norm_eps=1e-12),
    model_class=lambda config: hf.BertModel(config, add_pooling_layer=False),
    blocks="encoder.layer",
    down="output.dense",
    tensors=_bert_tensors,
    metadata={
        "context_length": N_CTX,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": False,
        "pooling_type": int(gguf.PoolingType.MEAN),
    },
    add_bos=False,
    embd_std=1.0,
    has_goldens=False,
    seed=SEEDS["bert"],
    tokenizer_metadata={"token_type_count": 2},
)


class Weights(torch.nn.Module):
    """Parameters under their GGUF names, without a forward pass. For an architecture that transformers lacks."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))


def _plamo2_shapes(n_vocab: int) -> dict[str, tuple[int, ...]]:
    """The tensors that llama.cpp's `src/models/plamo2.cpp` reads. Some names have no ".weight"."""
    n_embd, n_ff, d_inner, d_conv, d_state, n_ssm_head = 64, 96, 64, 4, 16, 4
    n_head, n_head_kv, n_embd_head = 4, 2, 16
    n_dt = 64  # llama.cpp's own max(64, n_embd / 16)
    shapes = {
        "token_embd.weight": (n_vocab, n_embd),
        "output_norm.weight": (n_embd,),
        "output.weight": (n_vocab, n_embd),
    }
    for il in range(2):
        shapes |= {f"blk.{il}.{name}": shape for name, shape in {
            "attn_norm.weight": (n_embd,),
            "post_attention_norm": (n_embd,),
            "ffn_norm.weight": (n_embd,),
            "post_ffw_norm": (n_embd,),
            "ffn_up.weight": (2 * n_ff, n_embd),  # gate and up in one matrix
            "ffn_down.weight": (n_embd, n_ff),
        }.items()}
    shapes |= {f"blk.0.{name}": shape for name, shape in {
        "ssm_in.weight": (2 * d_inner, n_embd),
        "ssm_conv1d.weight": (d_inner, d_conv),
        "ssm_x.weight": (n_dt + 2 * d_state, d_inner),
        "ssm_dt.weight": (n_ssm_head, n_dt),
        "ssm_dt.bias": (n_ssm_head,),
        "ssm_a": (n_ssm_head,),
        "ssm_d": (n_ssm_head,),
        "ssm_dt_norm": (n_dt,),
        "ssm_b_norm": (d_state,),
        "ssm_c_norm": (d_state,),
        "ssm_out.weight": (n_embd, d_inner),
    }.items()}
    shapes |= {f"blk.1.{name}": shape for name, shape in {
        "attn_qkv.weight": ((n_head + 2 * n_head_kv) * n_embd_head, n_embd),
        "attn_q_norm.weight": (n_head, n_embd_head),
        "attn_k_norm.weight": (n_head_kv, n_embd_head),
        "attn_output.weight": (n_embd, n_head * n_embd_head),
    }.items()}
    return shapes


def _plamo2_tensors(model) -> Tensors:
    # A must be negative, so that the state decays: its factor per step is exp(dt * A).
    return dict(sorted((name, _array(-param.exp() if name.endswith(".ssm_a") else param))
                       for name, param in model.named_parameters()))


# Its graph does not apply control vectors (no `build_cvec`), so llama.cpp silently ignores them. For the test that this
# program reports that. The only such decoders are plamo2 and hy-v4. (hunyuan-dense.cpp has no `build_cvec` either, but
# uses the graph of hunyuan-vl.cpp, which has.) The model has a Mamba block, then a block with attention: without a Mamba
# block llama.cpp aborts at the first token. No goldens, because transformers lacks the architecture.
PLAMO2 = Architecture(
    name="plamo2",
    arch="plamo2",
    config=hf.PretrainedConfig(),
    model_class=lambda config: Weights(_plamo2_shapes(config.vocab_size)),
    blocks="blk",
    down="ffn_down",
    tensors=_plamo2_tensors,
    metadata={
        "context_length": N_CTX,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": [0, 2],  # 0: a Mamba block
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 64,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,  # the number of heads of the Mamba block
        "ssm.group_count": 0,
    },
    add_bos=False,
    embd_std=1.0,
    output_norm_gain=2.8,
    has_goldens=False,
    seed=SEEDS["plamo2"],
)

ALL = [LLAMA, COMMAND_R, GPT2, BLOOM, GEMMA3, QWEN2, QWEN3, LLAMA_Q8_0, BERT, PLAMO2]
