"""What waits in RAM is never on the device while a model is read; torch's "meta" device stands for a GPU here."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from fastft.config import schema
from fastft.model import load, placement, quantization, quiet

BOTH = schema.Memory(embedding="host", head="host")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"), dtype="bfloat16")


def _config(folder: Path) -> object:
    return load.read_model_config(load.locate(schema.Model(name=str(folder))))


def test_the_map_names_what_waits(folder: Path) -> None:
    config = _config(folder)
    assert placement.device_map(schema.Memory(), config, "cuda:0") == {"": "cuda:0"}
    assert placement.device_map(BOTH, config, "cpu") == {"": "cpu"}
    assert placement.device_map(BOTH, config, "cuda:0") == {
        "": "cuda:0",
        "model.embed_tokens": "cpu",
        "lm_head": "cpu",
    }
    nf4 = schema.Memory(head="nf4")
    assert placement.device_map(nf4, config, "cuda:0") == {"": "cuda:0", "lm_head": "cpu"}


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_rest_goes_to_the_device(four_bit: bool, folder: Path) -> None:
    quiet.prepare_libraries()
    quiet.hide_loading_bars()
    expected = load_file(folder / "model.safetensors")
    base = load.locate(schema.Model(name=str(folder)))
    config = load.read_model_config(base)
    settings = {}
    if four_bit:
        settings["quantization_config"] = quantization.settings(schema.Quantization(), torch.device("cpu"))
    places = placement.device_map(BOTH, config, "meta")
    from transformers import AutoModelForCausalLM

    model = load._read(AutoModelForCausalLM, base, config, torch.bfloat16, settings=settings, places=places)
    devices = {name: parameter.device.type for name, parameter in model.named_parameters()}
    in_ram = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name for name, kind in devices.items() if kind == "cpu"} == in_ram
    assert len(devices) == 2 * 9 + 3
    for name in in_ram:
        assert torch.equal(model.get_parameter(name), expected[name])
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert getattr(model, "hf_device_map", None) is None
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit" if four_bit else "Linear"}


def test_a_4_bit_checkpoint_is_told_too(folder: Path) -> None:
    config = _config(folder)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantization.allow_parts_in_ram(None, config)
    assert config.quantization_config["llm_int8_enable_fp32_cpu_offload"] is True
    quantization.allow_parts_in_ram(None, _config(folder))  # nothing is quantized: nothing to tell


def test_transformers_gets_its_own_functions_back() -> None:
    from transformers import modeling_utils

    own = modeling_utils.accelerate_dispatch
    with placement.without_offload_hooks():
        assert modeling_utils.accelerate_dispatch is not own
    assert modeling_utils.accelerate_dispatch is own
