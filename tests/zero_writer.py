"""Checkpoints that DeepSpeed itself writes on the CPU, by two processes: `run_all` starts them, `_main` is one of them.

Beside each checkpoint lies what is in it, as DeepSpeed's own tool and the model say.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import two_processes

# name: stage, tied embeddings, frozen weights, groups of the optimizer
CASES: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2-tied": {"stage": 2, "tied": True},
    "zero2-groups": {"stage": 2, "groups": True, "frozen": True},
    "zero3-tied": {"stage": 3, "tied": True},
    "zero3-frozen": {"stage": 3, "frozen": True},
    "zero3-groups": {"stage": 3, "groups": True},
}


def run_all(folder: Path) -> None:
    """Write every case into its own folder below `folder`, with two processes."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    two_processes.run_script(__file__, folder, timeout_s=600, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PATH=path)


def _main(folder: Path) -> None:
    import deepspeed
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import save_file

    deepspeed.init_distributed(dist_backend="gloo")
    rank = torch.distributed.get_rank()
    for name, case in CASES.items():
        engine = _engine(case)
        for step in range(3):
            tokens = torch.arange(step, step + 16).reshape(2, 8) % 50
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
        target = folder / name
        engine.save_checkpoint(str(target), tag="global_step3")
        torch.distributed.barrier()
        if rank == 0:
            masters = get_fp32_state_dict_from_zero_checkpoint(str(target))
            save_file(
                {key: value.clone().contiguous() for key, value in masters.items()}, target / "masters.safetensors"
            )
            if case["stage"] < 3:
                half = {key: value.detach().clone() for key, value in engine.module.state_dict().items()}
                save_file(half, target / "weights.safetensors")
            (target / "config.json").write_text(json.dumps(engine.module.config.to_dict()))
        torch.distributed.barrier()


def _engine(case: dict[str, Any]) -> Any:
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=51,
        max_position_embeddings=64,
        tie_word_embeddings=case.get("tied", False),
    )
    model = LlamaForCausalLM(config)
    if case.get("frozen"):
        for name, weight in model.named_parameters():
            weight.requires_grad = "self_attn" in name or "norm" in name
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    if case.get("groups"):
        groups = [
            {"params": [weight for name, weight in trained if "norm" not in name], "weight_decay": 0.1},
            {"params": [weight for name, weight in trained if "norm" in name], "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": [weight for _, weight in trained]}]
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": case["stage"], "sub_group_size": 3000, "reduce_bucket_size": 5000},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
