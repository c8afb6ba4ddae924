"""Random models of many architectures, small enough to be made on the spot. Imports transformers when a model is built."""

from collections.abc import Callable
from typing import Any

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN_VISION = {"depth": 1, "num_heads": 4, "hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32}
QWEN_IMAGES = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT))


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**TEXT))


def gemma3_text() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**TEXT))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    # n_inner = n_embd makes every MLP weight square: the shape cannot tell Conv1D from Linear.
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=32, vocab_size=64, n_positions=64, bos_token_id=1)
    )


def gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings = {name: value for name, value in TEXT.items() if name not in ("num_key_value_heads", "head_dim")}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**settings))


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    settings = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    vision = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=vision, tie_word_embeddings=False, **settings)
    )


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "clip_vision_model", **VISION}
    text = {"model_type": "llama", **TEXT}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=60))


def llava_next() -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    vision = {"model_type": "clip_vision_model", **VISION}
    text = {"model_type": "llama", **TEXT}
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        text_config=text, vision_config=vision, image_token_index=60, image_grid_pinpoints=pinpoints
    )
    return LlavaNextForConditionalGeneration(config)


def internvl() -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {**VISION, "model_type": "internvl_vision", "image_size": (28, 28), "patch_size": (14, 14)}
    text = {"model_type": "qwen2", **TEXT}
    config = InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=60, image_seq_length=1, tie_word_embeddings=False
    )
    return InternVLForConditionalGeneration(config)


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 1, "num_heads": 4, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    text = {**TEXT, "rope_parameters": ROPE}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IMAGES)
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {**TEXT, "rope_parameters": ROPE}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_VISION, tie_word_embeddings=False, **QWEN_IMAGES)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {**TEXT, "rope_parameters": ROPE}
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IMAGES)
    return Qwen3VLForConditionalGeneration(config)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4))


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT, **EXPERTS))


def deepseek_v3() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings = {
        **{name: value for name, value in TEXT.items() if name != "head_dim"},
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**settings))


def qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {**TEXT, **EXPERTS, "rope_parameters": ROPE}
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IMAGES)
    return Qwen3VLMoeForConditionalGeneration(config)


def jamba() -> Any:
    from transformers import JambaConfig, JambaForCausalLM

    settings = {name: value for name, value in TEXT.items() if name != "head_dim"}
    return JambaForCausalLM(
        JambaConfig(
            **settings,
            num_experts=4,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        )
    )


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    # hidden_size = intermediate_size: the down projection of each expert is square.
    settings = TEXT | {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**settings, layer_types=["full_attention"] * 2))


def nomic_bert() -> Any:
    from transformers import NomicBertConfig, NomicBertModel

    settings = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    return NomicBertModel(NomicBertConfig(**settings, num_attention_heads=4, max_position_embeddings=64))


def clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**VISION))


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {name: value for name, value in TEXT.items() if name not in ("num_key_value_heads", "head_dim")}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def convnext() -> Any:
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=32))


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="bottleneck"))


def wav2vec2() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    windows = {"conv_dim": (8, 12, 12), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2), "conv_bias": True}
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    position = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2Model(Wav2Vec2Config(**sizes, **windows, **position, feat_extract_norm="layer"))


BUILDERS: dict[str, Callable[[], Any]] = {
    builder.__name__: builder
    for builder in (
        llama, qwen2, gemma3_text, gpt2, gpt_neox, gemma3, llava, llava_next, internvl, qwen2_vl,
        qwen2_5_vl, qwen3_vl, mixtral, qwen3_moe, deepseek_v3, qwen3_vl_moe, jamba, gpt_oss,
        nomic_bert, clip_vision, clip, convnext, resnet, wav2vec2,
    )
}  # fmt: skip
