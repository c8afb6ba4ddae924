"""What a vision-language model makes of images: its own processor, asked for tokens while preparing and for pixels in a step.

The processor is the truth: what it hands to its tokenizer in place of an image is what stands in the rendered text here,
so ids equal `processor.apply_chat_template(messages, tokenize=True)`. How many tokens an image takes depends on its size
alone; the processor is asked once for each size, with an empty picture.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fastft.config import schema
from fastft.data import images
from fastft.data.dialogue import ImageRef, PlacedImage
from fastft.data.formats import BadRowError
from fastft.data.images import BadImageError
from fastft.data.samples import NOT_LEARNED, Sample
from fastft.data.spool import Spool
from fastft.data.template import ShownImage, Span

if TYPE_CHECKING:
    import torch

# What processors give for texts; the rest are pixels and what the model needs to know about them.
TEXT_KEYS = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets"}
)
TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")
# How models that let several samples share a row count positions: one number a token, or three of which an image's
# tokens take rows and columns (Qwen-VL). Others (Gemma 3 looks at images both ways) get a row for each sample.
POSITIONS: Mapping[str, Literal["line", "grid"]] = {
    "llava": "line",
    "llava_next": "line",
    "internvl": "line",
    "qwen2_vl": "grid",
    "qwen2_5_vl": "grid",
    "qwen3_vl": "grid",
    "qwen3_vl_moe": "grid",
}
# Threads that decode images; more wait for each other.
MOST_THREADS = 8
# Of the picture with which the processor is tried.
TRIED_SIZE = (64, 64)


class Seer:
    """A processor, ready for a data set.

    Args:
        processor: of transformers, with tokenizer and image processor.
        image_token_id: the id that the model replaces by the features of an image.
        vision: the config's section.
        model_type: of the model's config.json.
        folder: for images that rows hold themselves; None: where the system keeps temporary files.

    Attributes:
        packs: whether several samples may share a row.
        positions: how positions are counted then; None if they may not.
    """

    def __init__(
        self,
        processor: Any,
        image_token_id: int,
        vision: schema.Vision,
        model_type: str,
        *,
        folder: Path | None = None,
    ) -> None:
        self.processor = processor
        self._spool = Spool(folder)
        self._pool: ThreadPoolExecutor | None = None
        self.positions = POSITIONS.get(model_type)
        self.packs = self.positions is not None
        self.image_token_id = image_token_id
        self.skips_bad_images = vision.on_bad_image == "skip"
        self.max_image_pixels = vision.max_image_pixels
        # What the chat template writes for an image.
        self.mark: str = getattr(processor, "boi_token", None) or processor.image_token
        token = str(processor.tokenizer.convert_ids_to_tokens(image_token_id))
        video = getattr(processor, "video_token", None)
        # What no text may hold: the model would look for an image there.
        self._forbidden = tuple(text for text in (token, video) if text and text != self.mark)
        self._replacements: dict[tuple[int, int], str] = {}
        self._sizes: dict[str, tuple[int, int] | BadImageError] = {}
        _, tried = self._asked([_empty(TRIED_SIZE)])
        # Models that treat the tokens of images in another way (Qwen-VL, Gemma 3) are told which these are.
        self.type_key = next((key for key in TYPE_KEYS if key in tried), None)
        self._typed: frozenset[int] = frozenset()
        if self.type_key is not None:
            pairs = zip(tried["input_ids"][0], tried[self.type_key][0], strict=True)
            self._typed = frozenset(int(token) for token, kind in pairs if int(kind))

    def expanded(
        self, text: str, spans: Sequence[Span], refs: Sequence[ImageRef]
    ) -> tuple[str, list[Span], list[ShownImage]]:
        """A rendered dialogue with as many marks for each image as it has tokens.

        Args:
            text: with one mark for each image.
            spans: the learned stretches in characters, sorted and disjoint; none reaches into a mark.
            refs: the images in the order of their marks.

        Returns:
            text, spans and, for each image, where it stands.

        Raises:
            BadImageError: an image cannot be used.
            BadRowError: the text itself holds a mark of the model's.
        """
        pieces = text.split(self.mark)
        if len(pieces) - 1 != len(refs):
            found = f"{len(pieces) - 1} times for {len(refs)} images"
            raise BadRowError(f"the rendered dialogue holds the model's image mark {self.mark} {found}")
        for forbidden in self._forbidden:
            if forbidden in text:
                raise BadRowError(f"the text holds {forbidden}, which the model reads as an image or a film")
        sizes = [self.size(ref) for ref in refs]
        shown: list[ShownImage] = []
        written, place = [pieces[0]], len(pieces[0])
        # Characters of the text up to each image's mark, and by how many more what follows it is shifted.
        shifts: list[tuple[int, int]] = []
        before = len(pieces[0])
        for ref, size, piece in zip(refs, sizes, pieces[1:], strict=True):
            replacement = self.replacement(size, ref)
            shown.append(((place, place + len(replacement)), self._spool.keep(ref), size))
            written += [replacement, piece]
            place += len(replacement) + len(piece)
            shifts.append((before, len(replacement) - len(self.mark)))
            before += len(self.mark) + len(piece)

        def moved(character: int) -> int:
            return character + sum(more for start, more in shifts if start < character)

        return "".join(written), [(moved(start), moved(end)) for start, end in spans], shown

    def look_at(self, refs: Iterable[ImageRef]) -> None:
        """Decode the files that have not been looked at yet, several at once: Pillow lets go of the interpreter."""
        new = list({ref.path: ref for ref in refs if ref.path is not None and ref.path not in self._sizes}.values())
        if len(new) > 1:
            for ref, known in zip(new, self._threads().map(self._examined, new), strict=True):
                self._sizes[str(ref.path)] = known

    def _examined(self, ref: ImageRef) -> tuple[int, int] | BadImageError:
        try:
            return images.examine(ref, self.max_image_pixels)
        except BadImageError as error:
            return error

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS), "images")
        return self._pool

    def size(self, ref: ImageRef) -> tuple[int, int]:
        """Width and height of an image, which is decoded to see that it can be; each file once.

        Raises:
            BadImageError: it cannot be used.
        """
        if ref.path is None:
            return images.examine(ref, self.max_image_pixels)
        known = self._sizes.get(ref.path)
        if known is None:
            known = self._sizes[ref.path] = self._examined(ref)
        if isinstance(known, BadImageError):
            raise BadImageError(str(known))
        return known

    def replacement(self, size: tuple[int, int], ref: ImageRef) -> str:
        """What the processor writes in place of an image of this width and height.

        Raises:
            BadImageError: the processor takes no image of this shape.
        """
        if size not in self._replacements:
            try:
                text, _ = self._asked([_empty(size)])
            except ValueError as error:
                width, height = size
                raise BadImageError(
                    f"image {images.shown(ref.name)}: {width} x {height} pixels cannot be processed ({error})"
                ) from error
            self._replacements[size] = text
        return self._replacements[size]

    def types(self, ids: Sequence[int]) -> list[int]:
        """1 for each token that belongs to an image, 0 for others."""
        return [int(token in self._typed) for token in ids]

    def pixels(self, refs: Sequence[ImageRef]) -> "dict[str, torch.Tensor]":
        """What the model gets of images besides their tokens: pixel_values and, by model, grids or sizes.

        Raises:
            BadImageError: a file has changed since it was looked at.
        """
        if not refs:
            return {}
        pictures = list(self._threads().map(self._picture, refs)) if len(refs) > 1 else [self._picture(refs[0])]
        _, made = self._asked(pictures, return_tensors="pt")
        return {key: value for key, value in made.items() if key not in TEXT_KEYS}

    def _picture(self, ref: ImageRef) -> Any:
        return images.read(self._spool.content(ref), self.max_image_pixels)

    def _asked(self, pictures: Sequence[Any], **settings: Any) -> tuple[str, Mapping[str, Any]]:
        """The processor's answer for pictures, and the text that it made of their marks."""
        listener = _Listener(self.processor.tokenizer)
        self.processor.tokenizer = listener
        try:
            made = self.processor(text=[self.mark * len(pictures)], images=list(pictures), **settings)
        finally:
            self.processor.tokenizer = listener.tokenizer
        return listener.heard, made


class _Listener:
    """A tokenizer that remembers the text it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.heard = ""

    def __call__(self, text: Any, *args: Any, **settings: Any) -> Any:
        self.heard = text if isinstance(text, str) else text[0]
        return self.tokenizer(text, *args, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class VisionCollator:
    """Joins samples with images into a batch; shorter rows are filled up at the right.

    One sample a row: the padding is masked and no positions are given, for a model that sees counts its own. Several
    samples a row: positions tell them apart, and the padding too, as in `collate`.

    Args:
        seer: makes the pixels.
        pad_token_id: fills up shorter rows.
        packed: whether a row may hold several samples.
        flatten: lay all rows into a single one; only with `packed`. Flash attention tells samples apart in one row only.
    """

    def __init__(self, seer: Seer, pad_token_id: int, *, packed: bool = False, flatten: bool = False) -> None:
        assert seer.packs or not packed
        self.seer = seer
        self.pad_token_id = pad_token_id
        self.packed = packed
        self.flatten = flatten and packed

    def __call__(self, samples: Sequence[Sample]) -> "dict[str, torch.Tensor]":
        """input_ids, labels, the model's type ids, int64 [B, T]; attention_mask or position_ids; pixels of images.

        position_ids are [B, T], or [4, B, T] where images take rows and columns: within the sample, then the three.
        """
        import torch

        if self.flatten:
            samples = [_joined(samples)]
        longest = max(len(sample["input_ids"]) for sample in samples)
        empty = [longest - len(sample["input_ids"]) for sample in samples]
        placed: list[PlacedImage] = [image for sample in samples for image in sample.get("images", ())]
        rows = {
            "input_ids": [s["input_ids"] + [self.pad_token_id] * n for s, n in zip(samples, empty, strict=True)],
            "labels": [s["labels"] + [NOT_LEARNED] * n for s, n in zip(samples, empty, strict=True)],
        }
        if not self.packed:
            rows["attention_mask"] = [[1] * (longest - n) + [0] * n for n in empty]
        if self.seer.type_key is not None:
            rows[self.seer.type_key] = [
                self.seer.types(s["input_ids"]) + [0] * n for s, n in zip(samples, empty, strict=True)
            ]
        batch = {key: torch.tensor(row, dtype=torch.int64) for key, row in rows.items()}
        pixels = self.seer.pixels([image.ref for image in placed])
        if self.packed:
            batch["position_ids"] = self._positions(samples, empty, pixels)
        return batch | pixels

    def _positions(
        self, samples: Sequence[Sample], empty: Sequence[int], pixels: "Mapping[str, torch.Tensor]"
    ) -> "torch.Tensor":
        import torch

        lines = [s["position_ids"] + list(range(n)) for s, n in zip(samples, empty, strict=True)]
        if self.seer.positions == "line":
            return torch.tensor(lines, dtype=torch.int64)
        merge = int(self.seer.processor.image_processor.merge_size)
        grids = [[int(n) for n in grid] for grid in pixels.get("image_grid_thw", ())]
        counted, taken = [], 0
        for sample, line in zip(samples, lines, strict=True):
            images = sample.get("images", [])
            own = grids[taken : taken + len(images)]
            taken += len(images)
            counted.append(np.stack([np.asarray(line), *grid_positions(line, images, own, merge)]))
        return torch.from_numpy(np.stack(counted, axis=1))


def grid_positions(
    line: Sequence[int], images: Sequence[PlacedImage], grids: Sequence[Sequence[int]], merge: int
) -> npt.NDArray[np.int64]:
    """Time, row and column of each token of a row, int64 [3, T] (Qwen2-VL, Wang et al. 2024, section 2.1).

    A text's tokens count on in all three. An image's tokens have its first position in time and count rows and columns
    from there; what follows goes on behind the larger of the two.

    Args:
        line: positions within each sample, starting again at 0; T of them.
        images: in the order of their tokens.
        grids: frames, rows and columns of each image, in patches.
        merge: patches that become one token, by side.
    """
    found = np.tile(np.asarray(line, dtype=np.int64), (3, 1))
    ends = [place for place in range(1, len(line)) if line[place] == 0] + [len(line)]
    for image, (frames, rows, columns) in zip(images, grids, strict=True):
        end = next(end for end in ends if end > image.start)
        height, width = rows // merge, columns // merge
        length = frames * height * width
        assert length == image.length, (length, image)
        first = found[0, image.start]
        after = image.start + length
        place = np.arange(length)
        found[:, image.start : after] = first + np.stack(
            [place // (height * width), place // width % height, place % width]
        )
        found[:, after:end] = first + max(height, width) + np.arange(end - after)
    return found


def _joined(samples: Sequence[Sample]) -> Sample:
    """All samples as one row."""
    joined: Sample = {"input_ids": [], "labels": [], "position_ids": [], "images": []}
    for sample in samples:
        before = len(joined["input_ids"])
        joined["images"] += [replace(image, start=image.start + before) for image in sample.get("images", ())]
        for key in ("input_ids", "labels", "position_ids"):
            joined[key] += sample[key]
    return joined


def _empty(size: tuple[int, int]) -> Any:
    from PIL import Image

    return Image.new("RGB", size)
