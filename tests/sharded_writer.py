"""Sharded checkpoints that torch itself writes on the CPU, by two processes: `run_all` starts them, `_main` is one of them.

Beside them lies what is in them, gathered by torch.
"""

import sys
from pathlib import Path
from typing import Any

import tiny_llama
import two_processes


def run_all(folder: Path) -> None:
    """Write every case into its own folder below `folder`, with two processes."""
    two_processes.run_script(__file__, folder, OMP_NUM_THREADS="1")


def _main(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from torch import distributed
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = {name: torch.from_numpy(array).bfloat16() for name, array in tiny_llama.weights(seed=4).items()}
    whole["model.norm.weight"] = whole["model.norm.weight"].float()

    def sharded(dimension: int) -> dict[str, Any]:
        return {name: distribute_tensor(tensor, mesh, [Shard(dimension)]) for name, tensor in whole.items()}

    rows = sharded(0)
    checkpoint.save(rows, checkpoint_id=str(folder / "plain"))
    # accelerate's layout: the model wrapped, the optimizer beside it.
    checkpoint.save({"model": rows}, checkpoint_id=str(folder / "checkpoint-7" / "pytorch_model_fsdp_0"))
    checkpoint.save({"optimizer": {"state": rows}}, checkpoint_id=str(folder / "checkpoint-7" / "optimizer_0"))
    # One folder for all, with counters and replicated tensors.
    state = {"model": rows, "optimizer": {"exp_avg": rows}, "train_state": {"step": torch.tensor(3)}, "note": "text"}
    checkpoint.save(state, checkpoint_id=str(folder / "all"))
    columns = {n: distribute_tensor(t, mesh, [Shard(1) if t.dim() == 2 else Replicate()]) for n, t in whole.items()}
    checkpoint.save(columns, checkpoint_id=str(folder / "columns"))
    cube = torch.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    odd = {"cube": distribute_tensor(cube, mesh, [Shard(1)]), "scalar": torch.tensor(2.5), "one": torch.ones(1)}
    checkpoint.save(odd, checkpoint_id=str(folder / "odd"))
    _fsdp(folder, mesh)
    if distributed.get_rank() == 0:
        save_file(whole, folder / "truth.safetensors")
        save_file({"cube": cube, "scalar": torch.tensor(2.5), "one": torch.ones(1)}, folder / "odd.safetensors")
    distributed.barrier()
    distributed.destroy_process_group()


def _fsdp(folder: Path, mesh: Any) -> None:
    """A transformers model under FSDP2, with a step behind it."""
    import torch
    from safetensors.torch import save_file
    from torch import distributed
    from torch.distributed import checkpoint, fsdp
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_dict({**tiny_llama.config(), "tie_word_embeddings": True})
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(16).reshape(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=str(folder / "fsdp2"))
    full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if distributed.get_rank() == 0:
        save_file(
            {name: tensor for name, tensor in full.items() if name != "lm_head.weight"}, folder / "fsdp2.safetensors"
        )
    distributed.barrier()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
