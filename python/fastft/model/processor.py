"""The processor of a vision-language model: tokenizer, chat template and what makes tokens and pixels of images.

It comes from the model's folder, by transformers' own class. Processors that also take films need torchvision for that
part alone; without it they are put together without that part, since fastft learns from images only.
"""

import importlib.util
from pathlib import Path
from typing import Any

from fastft.config import schema
from fastft.convert.json_file import read_object
from fastft.errors import CheckpointError, ConfigError
from fastft.model import folder_check

# What a processor is made of in a model's folder; they go with an adapter.
FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def load(folder: Path, vision: schema.Vision | None = None, *, model_type: str) -> Any:
    """Read the processor in `folder`.

    Args:
        folder: of a model, or of an adapter that has the files.
        vision: for its bounds on pixels.
        model_type: of the base's config.json.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        ConfigError: the image processor knows no bounds on pixels.
    """
    from transformers import AutoProcessor

    with folder_check.library_errors(f"model {folder}: its processor cannot be read"):
        kind = _class_of(folder, model_type)
        processor = (kind or AutoProcessor).from_pretrained(folder)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise CheckpointError(
            f"model {folder}: it has no processor for images (preprocessor_config.json is missing); take it from the "
            "model's page on the hub"
        )
    template = getattr(processor, "chat_template", None)
    if template:
        # Older models keep it in chat_template.json, which the tokenizer alone does not read.
        processor.tokenizer.chat_template = template
    if vision is not None:
        _bound_pixels(processor, vision)
    return processor


def _class_of(folder: Path, model_type: str) -> Any:
    """The processor's class, which an adapter's files need not name; None: AutoProcessor finds it.

    Without torchvision it is the class without its part for films.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    named = None
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        if named is None and path.is_file():
            named = read_object(path).get("processor_class")
    named = named or PROCESSOR_MAPPING_NAMES.get(model_type)
    kind = getattr(transformers, named, None) if isinstance(named, str) else None
    if kind is None or "video_processor" not in kind.get_attributes() or importlib.util.find_spec("torchvision"):
        return kind
    return without_films(kind)


def without_films(kind: Any) -> Any:
    """A processor class that takes no films, and so needs no video processor."""
    from transformers import AutoImageProcessor, AutoTokenizer

    class ForImages(kind):  # type: ignore[misc]  # transformers is untyped for mypy
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, folder: Any, processor_dict: Any = None, **settings: Any) -> list[Any]:  # noqa: ARG003
            settings.pop("subfolder", None)
            return [
                AutoImageProcessor.from_pretrained(folder, **settings),
                AutoTokenizer.from_pretrained(folder, **settings),
            ]

    ForImages.__name__ = ForImages.__qualname__ = kind.__name__
    return ForImages


def save(processor: Any, folder: Path, source: Path, vision: schema.Vision | None) -> None:
    """Put the processor's files into a folder that has the tokenizer's already.

    They are copied as they are, so that whatever reads the base reads them; a processor that the config has changed is
    written anew.
    """
    import shutil

    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if vision is not None and (vision.min_pixels is not None or vision.max_pixels is not None):
        processor.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)


def _bound_pixels(processor: Any, vision: schema.Vision) -> None:
    bounds = {"min_pixels": vision.min_pixels, "max_pixels": vision.max_pixels}
    wanted = {name: value for name, value in bounds.items() if value is not None}
    if not wanted:
        return
    images = processor.image_processor
    if not hasattr(images, "merge_size"):
        raise ConfigError(
            f"vision.{next(iter(wanted))}: {type(images).__name__} scales images to a size of its own; remove it "
            "(Qwen-VL's processors have bounds on pixels)"
        )
    processor.image_processor = type(images)(**{**images.to_dict(), **wanted})
