"""Adapters are read strictly: each setting understood or refused, each tensor used exactly once."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fastft.convert.adapter import canonical_key, read_adapter
from fastft.errors import CheckpointError, FastftError, FileError, PlanError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama


def test_plain_adapter(tmp_path: Path) -> None:
    adapter = read_adapter(tiny_llama.write_adapter(tmp_path / "adapter"))
    assert len(adapter.low_rank) == tiny_llama.LAYERS * len(tiny_llama.LINEARS)
    update = adapter.low_rank["model.layers.1.mlp.down_proj"]
    assert (update.a.shape, update.b.shape, update.scale) == ((4, 40), (24, 4), 2.0)


def test_rslora_and_patterns(tmp_path: Path) -> None:
    """First pattern that matches wins, matched from the end of the path (PEFT's rule)."""
    tensors = tiny_llama.adapter_tensors()
    tensors |= {key: tiny_llama.adapter_tensors(r=9)[key] for key in tensors if ".q_proj." in key}
    folder = tiny_llama.write_adapter(
        tmp_path / "adapter",
        tensors,
        use_rslora=True,
        rank_pattern={"q_proj": 9},
        alpha_pattern={"layers.0.self_attn.q_proj": 6, r"layers\.\d+\.self_attn.q_proj": 12},
    )
    found = read_adapter(folder).low_rank
    assert found["model.layers.0.self_attn.q_proj"].scale == 2.0  # 6 / sqrt(9)
    assert found["model.layers.1.self_attn.q_proj"].scale == 4.0  # 12 / sqrt(9)
    assert found["model.layers.0.mlp.up_proj"].scale == 4.0  # 8 / sqrt(4)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "_orig_mod.base_model.model.model.layers.0._orig_mod.self_attn.q_proj.lora_A.weight",
        "base_model.model._fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
    ],
)
def test_wrappers_are_stripped(tmp_path: Path, key: str) -> None:
    tensors = tiny_llama.adapter_tensors()
    plain = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key] = tensors.pop(plain)
    folder = tiny_llama.write_adapter(tmp_path / "adapter", tensors)
    assert "model.layers.0.self_attn.q_proj" in read_adapter(folder).low_rank
    assert canonical_key(key).startswith("model.layers.0.self_attn.q_proj.lora_A")


def refused(folder: Path, kind: type[FastftError], *words: str) -> None:
    with pytest.raises(kind) as refusal:
        read_adapter(folder)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "kind", "word"),
    [
        ({"peft_type": "IA4"}, PlanError, "IA4"),
        ({"peft_type": None}, PlanError, "peft_type"),
        ({"r": 0}, CheckpointError, "r must be"),
        ({"r": -4}, CheckpointError, "r must be"),
        ({"r": True}, CheckpointError, "r must be"),
        ({"r": 4.0}, CheckpointError, "r must be"),
        ({"r": "4"}, CheckpointError, "r must be"),
        ({"r": None}, CheckpointError, "r must be"),
        ({"r": 10**9}, CheckpointError, "r must be"),
        ({"r": 8}, CheckpointError, "rank 4"),
        ({"lora_alpha": 0}, CheckpointError, "lora_alpha"),
        ({"lora_alpha": float("nan")}, CheckpointError, "lora_alpha"),
        ({"lora_alpha": float("inf")}, CheckpointError, "lora_alpha"),
        ({"lora_alpha": "8"}, CheckpointError, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 0}}, CheckpointError, "rank_pattern"),
        ({"rank_pattern": [4]}, CheckpointError, "rank_pattern"),
        ({"alpha_pattern": {"(a+)+b": 4}}, CheckpointError, "pattern"),
        ({"alpha_pattern": {"(a|a)*b": 4}}, CheckpointError, "pattern"),
        ({"alpha_pattern": {"a" * 5000: 4}}, CheckpointError, "pattern"),
        ({"alpha_pattern": {"[": 4}}, CheckpointError, "pattern"),
        ({"use_rslora": "yes"}, CheckpointError, "use_rslora"),
        ({"bias": "some"}, CheckpointError, "bias"),
        ({"init_lora_weights": "pissa"}, PlanError, "pissa"),
        ({"init_lora_weights": "olora"}, PlanError, "olora"),
        ({"layer_replication": [[0, 2]]}, PlanError, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, PlanError, "alora"),
        ({"megatron_config": {"x": 1}}, PlanError, "megatron"),
        ({"use_something_new": True}, CheckpointError, "use_something_new"),
        ({"rank_patern": {"q_proj": 8}}, CheckpointError, "did you mean rank_pattern"),
    ],
)
def test_settings_that_are_refused(
    tmp_path: Path, changes: dict[str, object], kind: type[FastftError], word: str
) -> None:
    refused(tiny_llama.write_adapter(tmp_path / "adapter", **changes), kind, "adapter_", word)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone(tmp_path: Path, start: object) -> None:
    read_adapter(tiny_llama.write_adapter(tmp_path / "adapter", init_lora_weights=start, new_but_null=None, other=[]))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), "belong together"),
        (lambda tensors: tensors.update({f"{Q}.lora_B.weight": np.zeros((24, 5), np.float32)}), "share a rank"),
        (lambda tensors: tensors.update({f"{Q}.lora_B.weight": np.zeros(96, np.float32)}), "two matrices"),
        (lambda tensors: tensors.update({f"{Q}.lora_A.weight": np.zeros((4, 24), np.int64)}), "I64"),
        (lambda tensors: tensors.update({f"{Q}.lora_A.default.weight": np.zeros((4, 24), np.float32)}), "twice"),
        (lambda tensors: tensors.update({f"{Q}.hada_w1_a": np.zeros((4, 24), np.float32)}), "not one of PEFT's LoRA"),
        (lambda tensors: tensors.update({"lora_unet_x.weight": np.zeros((4, 24), np.float32)}), "not one of PEFT's"),
        (lambda tensors: tensors.update({f"{Q}.lora_a": np.zeros((4, 24), np.float32)}), "not one of PEFT's"),
        (lambda tensors: tensors.clear(), "empty"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, change: object, word: str) -> None:
    tensors = tiny_llama.adapter_tensors()
    assert callable(change)
    change(tensors)
    refused(tiny_llama.write_adapter(tmp_path / "adapter", tensors), CheckpointError, word)


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", FileError, "not there")
    folder = tiny_llama.write_adapter(tmp_path / "run" / "adapter")
    refused(tmp_path / "run", FileError, "did you mean", "adapter")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, FileError, "adapter_model.safetensors")


def test_originals_of_trained_modules_are_ignored_and_trained_ones_replace(tmp_path: Path) -> None:
    tensors = tiny_llama.adapter_tensors()
    head = np.ones((tiny_llama.VOCAB, tiny_llama.HIDDEN), np.float32)
    tensors["base_model.model.lm_head.modules_to_save.default.weight"] = head
    tensors["base_model.model.lm_head.original_module.weight"] = head * 0
    tensors["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"] = head[:, 0]
    adapter = read_adapter(tiny_llama.write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"]))
    assert set(adapter.replaced) == {"lm_head.weight", "model.layers.0.self_attn.q_proj.bias"}


def test_training_notes_are_read(tmp_path: Path) -> None:
    folder = tiny_llama.write_adapter(tmp_path / "adapter")
    (folder / "fastft_training.json").write_text(json.dumps({"quantization": {"type": "nf4"}}))
    assert read_adapter(folder).training == {"quantization": {"type": "nf4"}}
