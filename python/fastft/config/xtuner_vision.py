"""XTuner's vision-language configs: LLaVA made of a language model and a tower, and InternVL, become `vision` of ours.

Called by `xtuner` where `model.type` is one of these; gives the parts in which such a config differs from a text config.
"""

import shlex
from collections.abc import Callable
from typing import Any, Protocol

from fastft.config.python_text import Value

TYPES = ("LLaVAModel", "InternVL_V1_5")
DATA_TYPES = ("LLaVADataset", "InternVL_V1_5_Dataset")

Path = tuple[str | int, ...]


class Settings(Protocol):
    """The config's values by path; remembers which were asked for."""

    def take(self, *path: str | int) -> Value: ...
    def take_whole(self, *path: str | int) -> Value: ...


def is_internvl(settings: Settings) -> bool:
    """Whether the model is one vision-language model, and not a LLaVA made of parts."""
    return settings.take("model", "model_path") is not None


def base(settings: Settings, note: Callable[[str], None]) -> Value:
    """The name of the language model, or of the whole model where it is one."""
    if not is_internvl(settings):
        return settings.take("model", "llm", "pretrained_model_name_or_path")
    name = settings.take("model", "model_path")
    note(
        f"model.model_path = {name!r}: give the same model in transformers' own layout as model.name if this one needs its own code"
    )
    return name


def quantized_internvl(settings: Settings, note: Callable[[str], None]) -> bool:
    """Whether InternVL's language model is held in 4 bits."""
    if settings.take("model", "quantization_vit"):
        note("model.quantization_vit = True: the tower is held in the checkpoint's own dtype")
    return bool(settings.take("model", "quantization_llm"))


def section(settings: Settings, place: str, lora: dict[str, Any] | None, note: Callable[[str], None]) -> dict[str, Any]:
    """Our `vision`: the parts and what of them is learned.

    Args:
        settings: the config.
        place: its file.
        lora: `method.lora`, with which the tower's adapters share all but rank, alpha and targets; None: it has none.
        note: says what has no counterpart.
    """
    take = settings.take
    vision: dict[str, Any] = {}
    if not is_internvl(settings):
        vision["tower"] = take("model", "visual_encoder", "pretrained_model_name_or_path")
        if (layer := take("model", "visual_select_layer")) is not None:
            vision["select_layer"] = layer
        if take("model", "projector_depth") not in (None, 2):
            note("model.projector_depth: the projector has two layers here")
        _projector(take("model", "pretrained_pth"), place, vision, note)
    learn: dict[str, Any] = {"projector": "full"}
    adapters = take("model", "llm_lora")
    if take("model", "freeze_llm") and adapters is None:
        learn["llm"] = "frozen"
    is_frozen = take("model", "freeze_visual_encoder")
    if take("model", "visual_encoder_lora") is not None:
        learn["tower"] = "lora"
        learn["tower_lora"] = _tower_lora(settings, lora, note)
    elif is_frozen is False:
        learn["tower"] = "full"
    vision["learn"] = learn
    return vision


def sources(
    settings: Settings, at: Path, note: Callable[[str], None], refuse: Callable[[str], Exception]
) -> list[dict[str, Any]]:
    """The data sets of a LLaVADataset or an InternVL_V1_5_Dataset: files of dialogues beside a folder of images.

    Raises:
        ConfigError: made by `refuse`: the names of the files are missing.
    """
    take = settings.take
    if take(*at, "offline_processed_text_folder"):
        raise refuse(
            f"{'.'.join(map(str, at))}.offline_processed_text_folder: tokenised data is not read; give data_path"
        )
    function = take(*at, "dataset_map_fn")
    if str(getattr(function, "name", "")).endswith("llava_image_only_map_fn"):
        note("dataset_map_fn llava_image_only_map_fn: the words beside the image are kept in the prompt")
    learns_llm = not take("model", "freeze_llm") or take("model", "llm_lora") is not None
    square = take(*at, "pad_image_to_square")
    if square is not None and bool(square) != learns_llm and not is_internvl(settings):
        note(
            f"pad_image_to_square = {square}: pictures are cropped while the projector alone is trained, and filled up to"
            " a square else"
        )
    paths = settings.take_whole(*at, "data_path") or settings.take_whole(*at, "data_paths")
    folders = settings.take_whole(*at, "image_folder") or settings.take_whole(*at, "image_folders")
    times = settings.take_whole(*at, "repeat_times")
    listed = [paths] if isinstance(paths, str) else paths
    if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(path, str) for path in listed):
        raise refuse(f"{'.'.join(map(str, at))}: data_path, the file with the dialogues, is missing")
    beside = list(folders) if isinstance(folders, (list, tuple)) else [folders] * len(listed)
    weights = list(times) if isinstance(times, (list, tuple)) else [times] * len(listed)
    if len(beside) != len(listed) or len(weights) != len(listed):
        raise refuse(
            f"{'.'.join(map(str, at))}: there must be one image folder and one repeat_times for each data file"
        )
    found = []
    for path, folder, weight in zip(listed, beside, weights, strict=True):
        source: dict[str, Any] = {"source": path, "format": "sharegpt"}
        if isinstance(folder, str):
            source["images"] = folder
        if isinstance(weight, (int, float)) and weight != 1:
            source["weight"] = weight
        found.append(source)
    return found


def sample_images(images: Value, note: Callable[[str], None]) -> list[str]:
    """The files shown with the sample prompts; addresses are not fetched."""
    listed = [images] if isinstance(images, str) else images if isinstance(images, (list, tuple)) else []
    files = [image for image in listed if isinstance(image, str) and "://" not in image]
    if len(files) != len(listed):
        note("custom_hooks: evaluation_images: addresses are not fetched; set samples.images to a file")
    return files


def _projector(path: Value, place: str, vision: dict[str, Any], note: Callable[[str], None]) -> None:
    """The projector of the first stage: a folder, which a .pth has to become first."""
    if not isinstance(path, str):
        return
    if not path.rstrip("/").endswith(".pth"):
        vision["projector"] = path
        return
    # DeepSpeed's checkpoints are folders of that name.
    folder = path.rstrip("/").removesuffix(".pth") + "_hf"
    command = shlex.join(["fastft", "convert", "pth_to_hf", place, path, folder])
    note(
        f"model.pretrained_pth = {path!r}: a projector is given as a folder; run `{command}` and set"
        f" vision.projector={shlex.quote(folder)}/projector. Until then the projector starts from nothing"
    )


def _tower_lora(settings: Settings, lora: dict[str, Any] | None, note: Callable[[str], None]) -> dict[str, Any]:
    """The tower's adapters; what both adapters share is the language model's, where it has one."""
    take = settings.take
    at = ("model", "visual_encoder_lora")
    found: dict[str, Any] = {"r": take(*at, "r") or 8, "alpha": take(*at, "lora_alpha") or 8}
    if (targets := take(*at, "target_modules")) is not None:
        found["targets"] = targets
    dropout = take(*at, "lora_dropout")
    if lora is None:
        return {**found, "dropout": dropout or 0.0, "rslora": bool(take(*at, "use_rslora"))}
    shared = lora.get("dropout", 0.0)
    if dropout is not None and dropout != shared:
        note(f"model.visual_encoder_lora.lora_dropout = {dropout}: one adapter has one dropout; {shared} is used")
    return {**found, "dropout": shared, **({"rslora": lora["rslora"]} if "rslora" in lora else {})}
