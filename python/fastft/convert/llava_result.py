"""The folder that the training of a LLaVA leaves, with the parts that it was trained on (spec/formats.md 7.3).

fastft's own results say in fastft_training.json which tower was used; those of XTuner's tool say it in the adapter of the
tower, or not at all. `of_result` finds everything that `llava.plan_llava` needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft import console
from fastft.config.schema import Model
from fastft.convert import llava
from fastft.convert.adapter import CONFIG, TRAINING, Adapter, read_adapter
from fastft.convert.folder import existing_folder, read_checkpoint
from fastft.convert.json_file import read_object
from fastft.convert.sidefiles import copy_side_files, side_files
from fastft.errors import FileError, PlanError

_PROCESSOR = "processor_config.json"


@dataclass(frozen=True)
class LlavaResult:
    """A result, and what it was trained on.

    Attributes:
        folder: the result.
        llm: folder of the language model: the result itself where it was trained whole.
        tower: folder of the vision tower.
        llm_adapter: folder of its adapter, or None.
        tower_adapter: folder of its adapter, or None.
        select_layer: the layer of the tower whose features are taken.
    """

    folder: Path
    llm: Path
    tower: Path
    llm_adapter: Path | None
    tower_adapter: Path | None
    select_layer: int

    @property
    def projector(self) -> Path:
        return self.folder / llava.PROJECTOR

    @property
    def has_processor(self) -> bool:
        """Whether tokenizer, image processor and template lie in it."""
        return (self.folder / _PROCESSOR).is_file()


def find(llm: Path, folder: Path, visual_encoder: str | None, select_layer: int | None = None) -> LlavaResult:
    """Find the parts of a result.

    Args:
        llm: folder of the language model that it was trained on.
        folder: the result.
        visual_encoder: folder or hub id of the tower; None: as the result says.
        select_layer: as the result says, else -2, where None.

    Raises:
        FileError: the folder is no result, or its tower is not known.
        HubError: the tower cannot be found.
    """
    from fastft.hub import locate

    folder = existing_folder(folder, "the LLaVA")
    if not llava.is_result(folder):
        raise FileError(f"{folder}: no {llava.PROJECTOR}/ there; give the folder that the training of a LLaVA leaves")
    training = read_object(folder / TRAINING) if (folder / TRAINING).is_file() else {}
    said: Any = training.get("llava")
    said = said if isinstance(said, dict) else {}
    adapters = [folder / name for name in (llava.LLM_ADAPTER, llava.TOWER_ADAPTER)]
    llm_adapter, tower_adapter = (place if (place / CONFIG).is_file() else None for place in adapters)
    whole = folder / llava.TOWER
    if (whole / "config.json").is_file():
        tower = whole
    else:
        name = visual_encoder or said.get("visual_encoder") or _base_of(tower_adapter)
        if not name:
            raise FileError(
                f"{folder}: it does not say which vision tower it was trained with; name it with --visual-encoder"
            )
        tower = locate.model_called(str(name))
    is_whole = (folder / "config.json").is_file()
    if is_whole:
        console.note(f"the language model is the one in {folder}, which was trained whole")
    elif llm_adapter is None and training.get("quantization"):
        console.note("the language model was held in 4 bit and not trained; its own weights are taken")
    layer = said.get("select_layer", -2) if select_layer is None else select_layer
    return LlavaResult(folder, folder if is_whole else llm, tower, llm_adapter, tower_adapter, int(layer))


def parts(result: LlavaResult) -> tuple[llava.LlavaParts, int, Callable[[Path], None]]:
    """Read the headers of a result's parts.

    Returns:
        the parts; the number of tokens of the tokenizer; and what writes tokenizer, processor and template into a folder.
    """
    from fastft.model import llava as model
    from fastft.model import tokenizer

    if result.has_processor:
        words = tokenizer.read(result.folder)
        if llava.IMAGE_TOKEN not in words.get_vocab():
            raise PlanError(f"{result.folder}: its tokenizer has no {llava.IMAGE_TOKEN}; was it changed?")
        chosen = {
            name: path
            for name, path in side_files(result.folder).items()
            if name not in ("generation_config.json", "config.json")
        }

        def copied(place: Path) -> None:
            copy_side_files(chosen, place)

        write: Callable[[Path], None] = copied
    else:
        words, _, write = new_processor(result.llm, result.tower)

    found = llava.LlavaParts(
        llava.read_llm(result.llm),
        read_checkpoint(result.tower),
        llava.read_projector(result.projector),
        model.with_image_token(words),
        _adapter(result.llm_adapter),
        _adapter(result.tower_adapter),
        result.select_layer,
    )
    return found, len(words), write


def new_processor(llm: Path, tower: Path, settings: Model | None = None) -> tuple[Any, int, Callable[[Path], None]]:
    """Make the processor of a LLaVA out of the folders of its parts.

    Args:
        llm: folder of the language model.
        tower: folder of the CLIP.
        settings: of the language model, for the chat template where its tokenizer has none.

    Returns:
        the tokenizer, with `<image>`; the id of that; and what writes tokenizer, processor and template into a folder.

    Raises:
        CheckpointError: the tokenizer or the tower's image processor cannot be read.
    """
    from fastft.convert import internlm2, layout
    from fastft.model import llava as model
    from fastft.model import tokenizer

    if internlm2.is_internlm2(read_object(llm / "config.json")):
        # Its tokenizer is a class of its own; laid out, it is one that is read without the model's code.
        llm = layout.without_remote_code(llm)
    words = tokenizer.read(llm)
    if settings is not None:
        words = tokenizer.with_template(words, settings)
    processor = model.processor(words, tower)
    if not words.chat_template:
        console.warn(f"{llm}: its tokenizer has no chat template, so the LLaVA gets none")

    def write(place: Path) -> None:
        processor.save_pretrained(place)

    return words, model.with_image_token(words), write


def _adapter(folder: Path | None) -> Adapter | None:
    return None if folder is None else read_adapter(folder)


def _base_of(adapter: Path | None) -> object:
    return None if adapter is None else read_object(adapter / CONFIG).get("base_model_name_or_path")
