"""The families of published models: how each spells the sizes and options of a ModelConfig, and names its tensors.

A family is data. Both directions, reading and writing, follow from the same two-column tables: our field or parameter
on the left, the key of config.json or the name of the module on the right. {layer} and {expert} stand for numbers;
a name in brackets is the part of a matrix that holds several of ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json."""

    model_type: str
    architecture: str  # the class of transformers that has these weights and a head
    names: Mapping[str, str]  # our parameters' places in the tree -> their modules
    fields: Mapping[str, str]  # our fields -> their keys, where the value is the same
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that a config.json may leave out
    fixed: Mapping[str, Any] = field(default_factory=dict)  # our fields that every model of the family has
    required: Mapping[str, Any] = field(default_factory=dict)  # keys of which we know one value only
    head_names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # further names, by model.head
    activation_key: str = "hidden_act"
    bias_keys: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)  # model.bias -> values of `bias_names`
    bias_names: tuple[str, ...] = ()  # keys that say which parts have biases
    base: str = ""  # prefix of the names of all but the head, which files of the bare model leave out
    out_first: bool = True  # matrices are (outputs, inputs)
    by_head: bool = False  # a matrix of queries, keys and values has them head by head
    rotary_pairs: bool = False  # outputs of queries and keys that turn together stand side by side
    local_layers: str = ""  # which layers are local: "" none, "window" all, "types" as layer_types says
    default_pattern: str = ""  # of local layers, where layer_types is not there

    def names_for(self, head: str, tied: bool = True) -> dict[str, str]:
        """The table of names of a model with this `model.head`, and with `tied` tables or not."""
        names = {**self.names, **LABEL_NAMES.get(head, {}), **self.head_names.get(head.removesuffix("_gelu"), {})}
        if not tied and "head_bias" in names:  # an output matrix of its own has its own bias
            names["head_bias"] = names["head"]
        return names


LABEL_NAMES = {"classes": {"head_labels": "score"}}  # where a family says nothing else
TAG_NAMES = {"tags": {"head_labels": "classifier"}, "span": {"head_labels": "qa_outputs"}}
LABEL_CLASSES = {  # model.head -> what follows the family's name in that of its class
    "classes": "ForSequenceClassification", "tags": "ForTokenClassification", "span": "ForQuestionAnswering",
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- decoders

DECODER = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "vocab_size": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
LAYER = "model.layers.{layer}"
LLAMA = {
    "tokens": "model.embed_tokens",
    "layers/attention_norm": f"{LAYER}.input_layernorm",
    "layers/attention/query": f"{LAYER}.self_attn.q_proj",
    "layers/attention/key": f"{LAYER}.self_attn.k_proj",
    "layers/attention/value": f"{LAYER}.self_attn.v_proj",
    "layers/attention/query_norm": f"{LAYER}.self_attn.q_norm",
    "layers/attention/key_norm": f"{LAYER}.self_attn.k_norm",
    "layers/attention/out": f"{LAYER}.self_attn.o_proj",
    "layers/ffn_norm": f"{LAYER}.post_attention_layernorm",
    "layers/ffn/gate": f"{LAYER}.mlp.gate_proj",
    "layers/ffn/up": f"{LAYER}.mlp.up_proj",
    "layers/ffn/down": f"{LAYER}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
NORMS_BEHIND = {
    "layers/attention_post_norm": f"{LAYER}.post_attention_layernorm",
    "layers/ffn_post_norm": f"{LAYER}.post_feedforward_layernorm",
}
GEMMA = LLAMA | NORMS_BEHIND | {"layers/ffn_norm": f"{LAYER}.pre_feedforward_layernorm"}
PHI3 = LLAMA | {
    "layers/attention/query": f"{LAYER}.self_attn.qkv_proj[query]",
    "layers/attention/key": f"{LAYER}.self_attn.qkv_proj[key]",
    "layers/attention/value": f"{LAYER}.self_attn.qkv_proj[value]",
    "layers/ffn/gate": f"{LAYER}.mlp.gate_up_proj[gate]",
    "layers/ffn/up": f"{LAYER}.mlp.gate_up_proj[up]",
}
MIXTRAL = LLAMA | {
    "layers/moe/router": f"{LAYER}.block_sparse_moe.gate",
    "layers/moe/gate": f"{LAYER}.block_sparse_moe.experts.{{expert}}.w1",
    "layers/moe/down": f"{LAYER}.block_sparse_moe.experts.{{expert}}.w2",
    "layers/moe/up": f"{LAYER}.block_sparse_moe.experts.{{expert}}.w3",
}
QWEN3_MOE = LLAMA | {
    "layers/moe/router": f"{LAYER}.mlp.gate",
    "layers/moe/gate": f"{LAYER}.mlp.experts.{{expert}}.gate_proj",
    "layers/moe/up": f"{LAYER}.mlp.experts.{{expert}}.up_proj",
    "layers/moe/down": f"{LAYER}.mlp.experts.{{expert}}.down_proj",
}
GPT2 = {
    "tokens": "transformer.wte",
    "positions": "transformer.wpe",
    "layers/attention_norm": "transformer.h.{layer}.ln_1",
    "layers/attention/query": "transformer.h.{layer}.attn.c_attn[query]",
    "layers/attention/key": "transformer.h.{layer}.attn.c_attn[key]",
    "layers/attention/value": "transformer.h.{layer}.attn.c_attn[value]",
    "layers/attention/out": "transformer.h.{layer}.attn.c_proj",
    "layers/ffn_norm": "transformer.h.{layer}.ln_2",
    "layers/ffn/up": "transformer.h.{layer}.mlp.c_fc",
    "layers/ffn/down": "transformer.h.{layer}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
NEOX = {
    "tokens": "gpt_neox.embed_in",
    "layers/attention_norm": "gpt_neox.layers.{layer}.input_layernorm",
    "layers/attention/query": "gpt_neox.layers.{layer}.attention.query_key_value[query]",
    "layers/attention/key": "gpt_neox.layers.{layer}.attention.query_key_value[key]",
    "layers/attention/value": "gpt_neox.layers.{layer}.attention.query_key_value[value]",
    "layers/attention/out": "gpt_neox.layers.{layer}.attention.dense",
    "layers/ffn_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
    "layers/ffn/up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
    "layers/ffn/down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}

# ------------------------------------------------------------------------------------------------------------- encoders

BERT_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab_size": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "norm_eps": "layer_norm_eps",
    "token_types": "type_vocab_size",
    "causal": "is_decoder",  # its opposite: see config_json
}
ENCODER_LAYER = "encoder.layer.{layer}"


def _bert_names(base: str) -> dict[str, str]:
    at = f"{base}{ENCODER_LAYER}"
    return {
        "tokens": f"{base}embeddings.word_embeddings",
        "positions": f"{base}embeddings.position_embeddings",
        "types": f"{base}embeddings.token_type_embeddings",
        "embedding_norm": f"{base}embeddings.LayerNorm",
        "layers/attention/query": f"{at}.attention.self.query",
        "layers/attention/key": f"{at}.attention.self.key",
        "layers/attention/value": f"{at}.attention.self.value",
        "layers/attention/out": f"{at}.attention.output.dense",
        "layers/attention_post_norm": f"{at}.attention.output.LayerNorm",
        "layers/ffn/up": f"{at}.intermediate.dense",
        "layers/ffn/down": f"{at}.output.dense",
        "layers/ffn_post_norm": f"{at}.output.LayerNorm",
    }


BERT_HEADS = {
    "masked_lm": {
        "head_dense": "cls.predictions.transform.dense",
        "head_norm": "cls.predictions.transform.LayerNorm",
        "head_bias": "cls.predictions",
        "head": "cls.predictions.decoder",
    },
    "pooler": {"head_dense": "bert.pooler.dense"},
    "classes": {"head_dense": "bert.pooler.dense", "head_labels": "classifier"},
    **TAG_NAMES,
}
ROBERTA_HEADS = {
    "masked_lm": {
        "head_dense": "lm_head.dense",
        "head_norm": "lm_head.layer_norm",
        "head_bias": "lm_head",
        "head": "lm_head.decoder",
    },
    "pooler": {"head_dense": "roberta.pooler.dense"},
    "classes": {"head_dense": "classifier.dense", "head_labels": "classifier.out_proj"},
    **TAG_NAMES,
}
AT = "distilbert.transformer.layer.{layer}"
DISTILBERT = {
    "tokens": "distilbert.embeddings.word_embeddings",
    "positions": "distilbert.embeddings.position_embeddings",
    "embedding_norm": "distilbert.embeddings.LayerNorm",
    "layers/attention/query": f"{AT}.attention.q_lin",
    "layers/attention/key": f"{AT}.attention.k_lin",
    "layers/attention/value": f"{AT}.attention.v_lin",
    "layers/attention/out": f"{AT}.attention.out_lin",
    "layers/attention_post_norm": f"{AT}.sa_layer_norm",
    "layers/ffn/up": f"{AT}.ffn.lin1",
    "layers/ffn/down": f"{AT}.ffn.lin2",
    "layers/ffn_post_norm": f"{AT}.output_layer_norm",
    "head_dense": "vocab_transform",
    "head_norm": "vocab_layer_norm",
    "head_bias": "vocab_projector",
    "head": "vocab_projector",
}

# ------------------------------------------------------------------------------------------------------------- the list

ATTENTION_BIAS = {"bias_names": ("attention_bias",), "bias_keys": {"none": (False,), "attention": (True,)}}
GATED_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
QWEN2_DEFAULTS = {**GATED_DEFAULTS, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
GEMMA_DEFAULTS = {
    **GATED_DEFAULTS,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA_FIXED = {"norm_position": "both", "norm_plus_one": True, "embedding_scale": True}
GEMMA_OPTIONS = {"activation_key": "hidden_activation", "local_layers": "types", **ATTENTION_BIAS}
MOE_FIELDS = DECODER | {"experts_per_token": "num_experts_per_tok"}
ENCODER_FIXED = {
    "norm": "layer", "norm_position": "post", "positions": "learned", "bias": "all", "embedding_norm": True,
}  # fmt: skip
ENCODER_DEFAULTS = {
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True, "type_vocab_size": 2,
    "is_decoder": False, "pad_token_id": 0,
}  # fmt: skip
ENCODER_REQUIRED = {"position_embedding_type": "absolute", "add_cross_attention": False}

FAMILIES = [
    Family(
        "llama", "LlamaForCausalLM", LLAMA, DECODER, GATED_DEFAULTS, base="model.",
        bias_names=("attention_bias", "mlp_bias"),
        bias_keys={"none": (False, False), "attention": (True, False), "ffn": (False, True), "all": (True, True)},
    ),
    Family(
        "mistral", "MistralForCausalLM", LLAMA, DECODER,
        GATED_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
        base="model.", local_layers="window",
    ),
    Family(
        "qwen2", "Qwen2ForCausalLM", LLAMA, DECODER, QWEN2_DEFAULTS, {"bias": "qkv"},
        base="model.", local_layers="types",
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", LLAMA, DECODER, QWEN2_DEFAULTS | {"head_dim": 128}, {"qk_norm": True},
        base="model.", local_layers="types", **ATTENTION_BIAS,
    ),
    Family(
        "gemma2", "Gemma2ForCausalLM", GEMMA,
        DECODER | {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
        GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        GEMMA_FIXED, base="model.", default_pattern="LG", **GEMMA_OPTIONS,
    ),
    Family(
        "gemma3_text", "Gemma3ForCausalLM", GEMMA,
        DECODER | {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
        GEMMA_DEFAULTS | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0}, GEMMA_FIXED | {"qk_norm": True},
        {"use_bidirectional_attention": False}, base="model.", default_pattern="LLLLLG", **GEMMA_OPTIONS,
    ),
    Family(
        "phi3", "Phi3ForCausalLM", PHI3, DECODER, GATED_DEFAULTS | {"rms_norm_eps": 1e-5},
        base="model.", local_layers="window",
    ),
    Family(
        "mixtral", "MixtralForCausalLM", MIXTRAL, MOE_FIELDS | {"experts": "num_local_experts"},
        {
            **GATED_DEFAULTS, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8,
            "num_experts_per_tok": 2, "num_local_experts": 8,
        },
        {"router_normalize": True}, base="model.", local_layers="window",
    ),
    Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", QWEN3_MOE,
        MOE_FIELDS | {"experts": "num_experts", "router_normalize": "norm_topk_prob", "ffn": "moe_intermediate_size"},
        GATED_DEFAULTS | {"norm_topk_prob": False, "num_experts_per_tok": 8, "use_sliding_window": False},
        {"qk_norm": True},
        {"mlp_only_layers": [], "decoder_sparse_step": 1}, base="model.", local_layers="window", **ATTENTION_BIAS,
    ),
    Family(
        "olmo2", "Olmo2ForCausalLM", LLAMA | NORMS_BEHIND, DECODER, GATED_DEFAULTS | {"rms_norm_eps": 1e-5},
        {"norm_position": "output", "qk_norm": True, "qk_norm_dims": "all"}, base="model.", **ATTENTION_BIAS,
    ),
    Family(
        "gpt2", "GPT2LMHeadModel", GPT2,
        {
            "layers": "n_layer", "width": "n_embd", "heads": "n_head", "vocab_size": "vocab_size",
            "max_positions": "n_positions", "norm_eps": "layer_norm_epsilon", "tied_embeddings": "tie_word_embeddings",
        },
        {
            "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
            "n_positions": 1024,
        },
        {"norm": "layer", "positions": "learned", "bias": "all"},
        {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        activation_key="activation_function", base="transformer.", out_first=False,
    ),
    Family(
        "gpt_neox", "GPTNeoXForCausalLM", NEOX,
        {
            "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
            "ffn": "intermediate_size", "vocab_size": "vocab_size", "norm_eps": "layer_norm_eps",
            "tied_embeddings": "tie_word_embeddings", "parallel_block": "use_parallel_residual",
        },
        {
            "hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_parallel_residual": True,
            "attention_bias": True, "rotary_pct": 0.25, "rope_theta": 10000.0,
        },
        {"norm": "layer"},
        bias_names=("attention_bias",), bias_keys={"all": (True,), "ffn": (False,)}, base="gpt_neox.", by_head=True,
    ),
    Family(
        "bert", "BertForMaskedLM", _bert_names("bert."), BERT_FIELDS, ENCODER_DEFAULTS, ENCODER_FIXED,
        ENCODER_REQUIRED, BERT_HEADS, base="bert.",
    ),
    Family(
        "roberta", "RobertaForMaskedLM", _bert_names("roberta."), BERT_FIELDS, ENCODER_DEFAULTS | {"pad_token_id": 1},
        ENCODER_FIXED, ENCODER_REQUIRED, ROBERTA_HEADS, base="roberta.",
    ),
    Family(
        "distilbert", "DistilBertForMaskedLM", DISTILBERT,
        {
            "layers": "n_layers", "width": "dim", "heads": "n_heads", "ffn": "hidden_dim", "vocab_size": "vocab_size",
            "tied_embeddings": "tie_word_embeddings", "max_positions": "max_position_embeddings",
        },
        {"activation": "gelu", "tie_word_embeddings": True, "max_position_embeddings": 512},
        {**ENCODER_FIXED, "norm_eps": 1e-12, "causal": False}, head_names=TAG_NAMES,
        activation_key="activation", base="distilbert.",
    ),
]  # fmt: skip
BY_TYPE = {family.model_type: family for family in FAMILIES}
