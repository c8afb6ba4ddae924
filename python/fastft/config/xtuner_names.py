"""What XTuner's names mean here: its functions for rows, its prompt templates and system texts, its classes.

Read by `xtuner`, which translates its configs. A name that stands in none of these tables has no counterpart, and that is
said to the person who imports the config.
"""

from collections.abc import Mapping
from typing import Any

# XTuner's model classes and the tasks that they are for.
TASKS = {
    "SupervisedFinetune": "sft",
    "DPO": "dpo",
    "ORPO": "orpo",
    "RewardModel": "reward",
    "LLaVAModel": "sft",
    "InternVL_V1_5": "sft",
}
# PagedAdamW32bit computes what AdamW does.
OPTIMIZERS = {
    "AdamW": "adamw",
    "PagedAdamW": "adamw",
    "PagedAdamW32bit": "adamw",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
}
# `training_args.optim` of the Hugging Face framework.
HUGGINGFACE_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}

# How a `dataset_map_fn` reads a row: a format of ours, or the columns that it joins.
FORMATS: Mapping[str, Mapping[str, Any]] = {
    "alpaca_map_fn": {"format": "alpaca"},
    "openai_map_fn": {"format": "messages"},
    "oasst1_map_fn": {"format": "guanaco"},
    "pretrain_map_fn": {"format": "text"},
    "wizardlm_map_fn": {"format": "sharegpt"},
    "llava_map_fn": {"format": "sharegpt"},
    "orpo_dpo_mix_40k_map_fn": {"format": "preference"},
    "default_map_fn": {"format": "columns", "columns": {"user": "{input}", "assistant": "{output}"}},
    "stack_exchange_map_fn": {"format": "columns", "columns": {"user": "{question}", "assistant": "{response}"}},
}
# Functions written for one data set: its part in configs/data says how the rows are read, system message included.
PARTS = {
    "alpaca_zh_map_fn": "alpaca_zh",
    "arxiv_map_fn": "arxiv_gentitle",
    "code_alpaca_map_fn": "code_alpaca",
    "colors_map_fn": "colorist",
    "medical_map_fn": "medical",
    "openorca_map_fn": "open_orca",
    "sql_map_fn": "sql",
    "crime_kg_assitant_map_fn": "lawyer",
    "law_reference_map_fn": "lawyer.1",
    "tiny_codes_map_fn": "code_alpaca",
}
# What such a function reads instead of the columns of the part that it shares the system message with.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "tiny_codes_map_fn": {"user": "{prompt}", "assistant": "{response}"},
}
# SYSTEM_TEMPLATE.NAME and the part in configs/data whose system message says the same in our words.
SYSTEMS = {
    "arxiv_gentile": "arxiv_gentitle",
    "colorist": "colorist",
    "coder": "code_alpaca",
    "lawyer": "lawyer",
    "medical": "medical",
    "sql": "sql",
}

# PROMPT_TEMPLATE.NAME and the file in configs/chat_templates that writes this form, or the model's own where XTuner's is another.
TEMPLATES = {
    "default": "default",
    "zephyr": "zephyr",
    "internlm_chat": "internlm_chat",
    "internlm2_chat": "internlm2_chat",
    "moss_sft": "moss_sft",
    "llama2_chat": "llama2_chat",
    "llama_2_chat": "llama2_chat",
    "code_llama_chat": "llama2_chat",
    "llama3_chat": "llama3_chat",
    "chatglm": "chatglm2",
    "chatglm2": "chatglm2",
    "chatglm3": "chatglm3",
    "qwen_chat": "chatml",
    "minicpm3": "chatml",
    "minicpm": "minicpm",
    "baichuan_chat": "baichuan_chat",
    "baichuan2_chat": "baichuan2_chat",
    "vicuna": "vicuna",
    "wizardlm": "vicuna",
    "wizardcoder": "wizardcoder",
    "mistral": "mistral",
    "mixtral": "mistral",
    "deepseek_moe": "mistral",
    "deepseek_v2": "deepseek",
    "deepseek_coder": "deepseek_coder",
    "deepseekcoder": "deepseek_coder",
    "gemma": "gemma",
    "cohere_chat": "cohere_chat",
    "phi3_chat": "phi3_chat",
}

# Hooks that only XTuner needs: what they do is always done here, or is of no use.
IDLE_HOOKS = frozenset(
    ("DatasetInfoHook", "VarlenAttnArgsToMessageHubHook", "ThroughputHook", "HFCheckpointHook", "SequenceParallelHook")
)

# Data sets that are refused, and what to do instead.
REFUSED_DATA = {
    "MOSSSFTDataset": "it reads MOSS's own form; write the dialogues as messages and give the file as data.train.0.source",
    "build_packed_dataset": "it reads InternLM's own files, tokenised or not; give the text or dialogues themselves",
    "RefCOCOJsonDataset": "boxes of RefCOCO are not built",
    "InvRefCOCOJsonDataset": "boxes of RefCOCO are not built",
}
FILE_LOADERS = ("json", "csv", "parquet", "text")
FILE_READERS = ("load_jsonl_dataset", "load_json_file")

# Settings without an effect of their own in our runs, or the same for all of them.
HARMLESS = (
    "tokenizer.*", "*.tokenizer", "*.tokenizer.*", "*.image_processor", "*.image_processor.*",
    "*.model_path", "*type", "model.llm.trust_remote_code", "model.use_varlen_attn",
    "model.llm.quantization_config.llm_int8_*", "model.llm.quantization_config.bnb_4bit_quant_storage", "*.task_type",
    "*.bias", "train_dataloader.num_workers", "train_dataloader.pin_memory", "train_dataloader.persistent_workers",
    "train_dataloader.prefetch_factor", "train_dataloader.collate_fn.*", "train_dataloader.sampler.*",
    "train_dataloader.batch_sampler.*", "*.remove_unused_columns", "*.shuffle_before_pack", "*.use_varlen_attn",
    "*.num_proc", "*.map_num_proc", "*.template_map_fn.*", "*.is_dpo", "*.is_reward", "*.reward_token_id",
    "*.max_packed_length", "*.ignore_verifications", "*.streaming", "optim_wrapper.loss_scale", "optim_wrapper.dtype",
    "optim_wrapper.clip_grad.error_if_nonfinite", "optim_wrapper.optimizer.eps", "param_scheduler.*", "custom_hooks.*",
    "default_hooks.*", "randomness.deterministic", "train_cfg.by_epoch", "train_cfg.val_interval",
    "training_args.do_train", "training_args.fp16", "training_args.bf16", "training_args.save_strategy",
    "training_args.ddp_find_unused_parameters", "training_args.remove_unused_columns", "training_args.report_to",
    "training_args.dataloader_num_workers", "training_args.group_by_length", "training_args.logging_strategy",
)  # fmt: skip
ROOTS = (
    "model", "tokenizer", "train_dataloader", "val_dataloader", "test_dataloader", "optim_wrapper", "param_scheduler",
    "train_cfg", "custom_hooks", "default_hooks", "randomness", "load_from", "resume", "visualizer", "work_dir",
    "strategy", "training_args",
)  # fmt: skip
