"""A tokenizer's chat template: dialogues to token ids, and which of the tokens the model learns.

The tokenizer's own template is the truth: ids equal `tokenizer.apply_chat_template(messages)`. Most templates do not
mark what the assistant says, so it is found here, in characters of the rendered text, then in tokens by the offsets
that the tokenizer gives. Takes dialogues of `dialogue`; `prepare`, `chat` and the sample answers use it.

A turn is learned from where the generation prompt ends (that is where the model starts to speak) to the end of its
end-of-turn mark, which the model must learn in order to stop; white space that the template puts after the mark is
not learned. A token that lies across a border belongs to the side on which it starts. A template that ends no turn at
all (ChatGLM3, GLM-4) gets the eos token behind the last answer, the one place where ids are more than transformers';
before that the mark of the next turn is learned, on which these models stop.

How a turn is found: the dialogue is rendered once as it is, and once per pattern of roles with each text replaced by a
mark of its own. Between the marks stands what the template itself writes; the real text must be these pieces with the
real contents (or the contents stripped) between them. Where it is not, because the template rewrites a turn (Qwen3 moves
<think> about, tool calls become text), that turn alone is replaced by a mark (or its call by one whose name is the mark)
and what stays equal before and after bounds it. Where that fails too, the row is refused, as is one of which the template
leaves something out. A dialogue with images is compared in the same way, but only the answers are replaced by marks: what
a template makes of a turn with images (LLaVA's show all images first) is its own affair. Mistral-Nemo shows a system message only while the user has the last word: such a dialogue is
rendered up to its last answer as `chat` does it, and the answer is put behind it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastft.data.byte_level import ByteLevel
from fastft.data.dialogue import IMAGE_MARK, Dialogue, ImageRef, Message, PlacedImage
from fastft.data.formats import BadRowError
from fastft.data.template_limits import TemplateLimitError, limited
from fastft.errors import DataError

# Marks stand for contents in skeletons; characters for private use, which no template touches or strips.
MARK, MARK_END = "\ue0f0", "\ue0f1"
# Stands for the eos token while looking for the end of a turn: some templates end the whole text with it.
EOS_MARK = "\ue0f2"
# What templates of Mistral's family demand of a call's id.
CALL_ID = re.compile(r"[A-Za-z0-9]{9}")
_TOO_MUCH = {MemoryError: "it makes a text that is too large", RecursionError: "it is nested too deep, or calls itself"}
# Skeletons kept; real data sets have a few dozen patterns of roles.
MAX_SKELETONS = 4096

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Span = tuple[int, int]
Rendering = Sequence[Mapping[str, Any]]


class _TooMuchError(DataError):
    """The template takes more time or memory than it may."""


class LeftOutError(BadRowError):
    """The template does not write all that the dialogue says."""


# Where an image stands in a rendered text, in characters; the image, its width and height in pixels.
ShownImage = tuple[Span, ImageRef, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A dialogue in tokens."""

    ids: Ids  # int32 [T]
    learned: Mask  # bool [T]: the loss counts this token
    images: tuple[PlacedImage, ...] = ()  # in the order of their tokens


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """What the template writes around the contents, for one pattern of roles."""

    order: tuple[int, ...]  # the message whose content follows literals[k]
    literals: tuple[str, ...]  # len(order) + 1 pieces
    lead: tuple[int, ...]  # per literal: characters at its end that the assistant says itself (an empty <think> block)
    tail: tuple[int, ...]  # per literal: characters at its start that end the turn before it


class ChatTemplate:
    """The chat template of a tokenizer, ready to encode dialogues and prompts.

    Args:
        tokenizer: a fast tokenizer of transformers.
        fallback: text of the template for a tokenizer that has none; the tokenizer's own always wins.
        of_processor: whether ids shall equal those of a processor's `apply_chat_template`, which lets the tokenizer add
            its own bos to a text that does not start with one (LLaVA's does not).

    Raises:
        DataError: no template at all, a slow tokenizer, or a template that does not even take one question and answer.
    """

    def __init__(self, tokenizer: Any, fallback: str | None = None, *, of_processor: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"chat template: the tokenizer {type(tokenizer).__name__} gives no character offsets; a tokenizer with "
                "a tokenizer.json is needed"
            )
        if tokenizer.chat_template is not None:
            text = tokenizer.get_chat_template()
        elif fallback is not None:
            text = fallback
        else:
            raise DataError(
                f"chat template: the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} has "
                "none; set model.chat_template to the template of its family (or to a .jinja file), or train with "
                "task: pretrain"
            )
        self._tokenizer = tokenizer
        self._of_processor = of_processor
        # What is used, and what belongs into the adapter's folder.
        self.text: str = text
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}
        # What the template made necessary in the dialogues so far and the user should know, each said once.
        self.notes: dict[str, None] = {}
        # What ends the assistant's turn ("<|im_end|>"); "" if the template has no such mark.
        self.end_of_turn: str
        # What ends only the last turn: the eos token of a template without an end-of-turn mark.
        self._end_of_text: str
        # Whether contents are handed over as lists of parts, for templates of vision models that take no plain text.
        self._parts = False
        try:
            self.end_of_turn, self._end_of_text, self._lead = self._ends()
        except _TooMuchError:
            raise
        except DataError:
            self._parts = True
            try:
                self.end_of_turn, self._end_of_text, self._lead = self._ends()
            except DataError:
                self._parts = False
                self._ends()  # raises: what it says of plain text is the better explanation
        # Without any end in the template: what is put behind the last answer, and tokens that may open a next turn.
        self._appended = ""
        self._turn_marks: tuple[str, ...] = ()
        if not self.end_of_turn and not self._end_of_text:
            self._appended = str(tokenizer.special_tokens_map.get("eos_token", ""))
            self._turn_marks = tuple(sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
        self._needs_call_ids: bool | None = None  # found out with the first tool call

    @property
    def learns_to_stop(self) -> bool:
        """Whether something learned tells the model to stop: without it, answers do not end."""
        return bool(self.end_of_turn or self._end_of_text or self._appended)

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer: the one that ends a turn (where it is one token), eos, or the user's turn."""
        backend = self._backend()
        ends = backend.encode(self.end_of_turn, add_special_tokens=False).ids if self.end_of_turn else []
        eos = self._tokenizer.eos_token_id
        found = ([ends[0]] if len(ends) == 1 else []) + ([] if eos is None else [int(eos)])
        if self._turn_marks:
            asked = [
                {"role": role, "content": _mark(index)} for index, role in enumerate(("user", "assistant", "user"))
            ]
            opening = self.render(asked).partition(_mark(1))[2]
            mark = next((mark for mark in self._turn_marks if opening.startswith(mark)), None)
            found += [] if mark is None else [int(self._tokenizer.convert_tokens_to_ids(mark))]
        return list(dict.fromkeys(found))

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[Ids, Mask]:
        """Token ids (int32 [T]) of a dialogue, and which are learned (bool [T]).

        Raises:
            DataError: the template refuses the dialogue, or rewrites it beyond finding the answers again.
        """
        text, spans = self.learned_spans(messages, tools)
        encoded = self.encode_batch([text], [spans])[0]
        return encoded.ids, encoded.learned

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids after which the model answers: the turns so far and the opening of the assistant's."""
        return self.ids(self.opened(messages, tools))

    def opened(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text after which the model answers."""
        return self.render([_as_mapping(message) for message in messages], tools, generation=True)

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text."""
        return list(self._backend().encode(text, add_special_tokens=self._adds_special_tokens(text)).ids)

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer adds its own tokens to a rendered text."""
        bos = self._tokenizer.bos_token
        return self._of_processor and not (bos is not None and text.startswith(str(bos)))

    def encode_batch(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], fast: ByteLevel | None = None
    ) -> list[Encoded]:
        """Tokens of rendered texts.

        Args:
            texts: as `learned_spans` gives them.
            spans: the learned stretches of each in characters, sorted and disjoint.
            fast: the tokenizer's fast road, for whoever encodes many dialogues.
        """
        if fast is None:
            return self._encode_plainly(texts, spans)
        found, others = fast.encode(texts, spans)
        encoded = [Encoded(ids, learned) for ids, learned in found]
        if others:
            plain = self._encode_plainly([texts[index] for index in others], [spans[index] for index in others])
            for index, other in zip(others, plain, strict=True):
                encoded[index] = other
        return encoded

    def encode_shown(
        self, texts: Sequence[tuple[str, Sequence[Span]]], shown: Sequence[Sequence[ShownImage]]
    ) -> list[Encoded]:
        """Tokens of texts in which images stand as the model's own marks, as many as it has tokens for each.

        Args:
            texts: rendered texts, and the learned stretches of each.
            shown: the images of each text, in order.
        """
        backend = self._backend()
        found = []
        for (text, spans), images in zip(texts, shown, strict=True):
            encoding = backend.encode(text, add_special_tokens=self._adds_special_tokens(text))
            learned = _mask(encoding, text, spans)
            placed = []
            for (start, end), ref, size in images:
                first = _token_from(encoding, text, start)
                placed.append(PlacedImage(ref, first, _token_from(encoding, text, end) - first, size))
            found.append(Encoded(np.asarray(encoding.ids, dtype=np.int32), learned, tuple(placed)))
        return found

    def _encode_plainly(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        """By the tokenizers library alone."""
        encodings = self._backend().encode_batch(list(texts), add_special_tokens=False)
        return [
            Encoded(np.asarray(encoding.ids, dtype=np.int32), _mask(encoding, text, learned))
            for encoding, text, learned in zip(encodings, texts, spans, strict=True)
        ]

    def render(
        self, messages: Rendering, tools: Sequence[Mapping[str, Any]] = (), *, generation: bool = False, **names: str
    ) -> str:
        """The dialogue as text, exactly as `apply_chat_template(tokenize=False)` gives it.

        Args:
            messages: role, content and so on, as the template sees them.
            tools: JSON schemas of tools.
            generation: whether to open the assistant's turn at the end.
            names: further names for the template; they win over the special tokens.

        Raises:
            BadRowError: the template refuses the dialogue.
        """
        return self._rendered([messages], tools, generation=generation, **names)[0]

    def render_all(self, dialogues: Sequence[Dialogue]) -> list[str | None]:
        """What `render` gives for each dialogue without tools, in half the time; None where it has to be asked."""
        plain = [
            not (dialogue.tools or any(message.tool_calls for message in dialogue.messages)) for dialogue in dialogues
        ]
        together = [
            [_as_mapping(message) for message in dialogue.messages]
            for dialogue, alone in zip(dialogues, plain, strict=True)
            if alone
        ]
        try:
            texts = iter(self._rendered(together, ()) if together else [])
        except BadRowError:
            return [None] * len(dialogues)  # one by one it is clear which of them the template refuses
        return [next(texts) if alone else None for alone in plain]

    def _rendered(
        self,
        conversations: Sequence[Rendering],
        tools: Sequence[Mapping[str, Any]],
        *,
        generation: bool = False,
        **names: str,
    ) -> list[str]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        shown = [
            [_in_parts(message) for message in messages] if self._parts else list(messages)
            for messages in conversations
        ]
        try:
            with limited(len(shown), sum(len(str(message.get("content"))) for each in shown for message in each)):
                rendered, _ = render_jinja_template(
                    conversations=shown,
                    tools=list(tools) or None,
                    chat_template=self.text,
                    add_generation_prompt=generation,
                    **{**self._tokenizer.special_tokens_map, **names},
                )
        except (jinja2.TemplateError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            # A template is a program: reading what a message does not have ends in any of these.
            raise BadRowError(f"the chat template refuses the dialogue: {error}") from error
        except (RecursionError, MemoryError, TemplateLimitError) as error:
            what = str(error) if isinstance(error, TemplateLimitError) else _TOO_MUCH[type(error)]
            raise _TooMuchError(f"chat template: {what}; this is no template for dialogues") from error
        return [str(text) for text in rendered]

    def learned_spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), text: str | None = None
    ) -> tuple[str, list[Span]]:
        """The dialogue as text, and the stretches of it (start, end in characters) that are learned.

        Args:
            messages: the turns.
            tools: JSON schemas of tools.
            text: what `render` gives for them, if it has been asked.

        Raises:
            BadRowError: the template refuses the dialogue, leaves a part of it out, or rewrites it beyond recognition.
        """
        has_calls = any(message.tool_calls for message in messages)
        if has_calls:
            messages = self._with_call_ids(messages)
        mappings = [_as_mapping(message) for message in messages]
        if text is None:
            text = self.render(mappings, tools)
        if MARK in text or MARK_END in text:
            raise BadRowError("the text holds the private characters U+E0F0 or U+E0F1, which fastft needs for itself")
        if tools or has_calls:
            _require_kept(text, messages, tools)
        else:
            try:
                skeleton = self._skeleton([message.role for message in messages])
            except LeftOutError:
                if messages[0].role != "system":
                    raise
                return self._continued(messages)
            if any(message.images for message in messages):
                _require_shown(text, messages)
                skeleton = self._around_answers(mappings, skeleton)
            spans = _walk(text, messages, skeleton)
            if spans is not None:
                return self._ended(text, messages, spans)
        spans = [
            self._turn_span(text, mappings, index, tools) for index, message in enumerate(messages) if message.learn
        ]
        return self._ended(text, messages, sorted(spans))

    def _ended(self, text: str, messages: Sequence[Message], spans: list[Span]) -> tuple[str, list[Span]]:
        """Put an end behind the last answer where the template has none, and learn it."""
        if self._appended and messages[-1].role == "assistant":
            self.notes[f"the chat template ends no turn; {self._appended} is put behind the last answer"] = None
            if messages[-1].learn:
                spans[-1] = (spans[-1][0], len(text) + len(self._appended))
            return text + self._appended, spans
        return text, self._to_the_end(text, messages, spans)

    def _continued(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """As `learned_spans`, for a template that writes the system message only while the user has the last word."""
        *earlier, last = messages
        opened = self.render([_as_mapping(message) for message in earlier], generation=True)
        skeleton = self._skeleton([message.role for message in earlier], generation=True)
        spans = _walk(opened, earlier, skeleton)
        if spans is None:
            raise LeftOutError("the chat template leaves out the text of turn 1 (system)")
        # What it writes for the last turn does not depend on the system message.
        other, found = self.learned_spans([*messages[1:-1], replace(last, learn=True)])
        start, end = found[-1]
        if last.learn:
            spans.append((len(opened), len(opened) + end - start))
        self.notes["the system message stands where the chat template puts it when it asks for the last answer"] = None
        return opened + other[start:], spans

    def _with_call_ids(self, messages: Sequence[Message]) -> list[Message]:
        """Give tool calls and their results the ids that the template demands; as they are where it demands none."""
        if self._needs_call_ids is None:
            self._needs_call_ids = self._demands_call_ids()
        if not self._needs_call_ids:
            return list(messages)
        self.notes["the chat template demands ids of nine signs of tool calls; those without got some"] = None
        new_ids: dict[str, str] = {}
        waiting: list[str] = []  # calls whose results come next
        given = 0
        found = []
        for message in messages:
            calls = []
            for call in message.tool_calls:
                own = call.get("id")
                if own is None or not CALL_ID.fullmatch(str(own)):
                    identity = f"call{given:05d}"
                    if own is not None:
                        new_ids[str(own)] = identity
                else:
                    identity = str(own)
                given += 1
                waiting.append(identity)
                calls.append({**call, "id": identity})
            identity_of = message.tool_call_id
            if message.role == "tool":
                expected = waiting.pop(0) if waiting else None
                identity_of = expected if identity_of is None else new_ids.get(identity_of, identity_of)
                if identity_of in waiting:
                    waiting.remove(identity_of)
            found.append(replace(message, tool_calls=tuple(calls), tool_call_id=identity_of))
        return found

    def _demands_call_ids(self) -> bool:
        """Whether the template refuses tool calls without an id and takes them with one."""
        for identity in ({}, {"id": "call00000"}):
            call = {"type": "function", "function": {"name": "name", "arguments": {}}, **identity}
            result = {"role": "tool", "content": "0"} | ({"tool_call_id": "call00000"} if identity else {})
            asked = {"role": "user", "content": "a"}
            try:
                self.render([asked, {"role": "assistant", "content": "", "tool_calls": [call]}, result])
            except BadRowError:
                continue
            return bool(identity)
        return False

    def _to_the_end(self, text: str, messages: Sequence[Message], spans: list[Span]) -> list[Span]:
        """Let the last turn reach the eos token at the end of the text, where no other mark ends a turn."""
        if self._end_of_text and spans and messages[-1].learn:
            end = text.rfind(self._end_of_text) + len(self._end_of_text)
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        return spans

    def _backend(self) -> Any:
        """The Rust tokenizer, without truncation and padding that a tokenizer.json may ask for."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _ends(self) -> tuple[str, str, str]:
        """End of a turn, end of the text, and what the assistant says before its content, from a small dialogue.

        Whatever follows an answer in every context (a question, the end, another answer to come) ends it. The eos
        token is replaced by a mark for this, because Phi-3 writes it at the end of the whole text only.
        """
        user, answer = {"role": "user", "content": _mark(0)}, {"role": "assistant", "content": _mark(1)}
        try:
            after = [
                self._after(_mark(1), [user, answer, {"role": "user", "content": _mark(2)}]),
                self._after(_mark(1), [user, answer], generation=True),
                self._after(_mark(1), [user, answer]),
            ]
            opened = self._after(_mark(0), [user], generation=True)
            written = self._after(_mark(0), [user, answer])
        except BadRowError as error:
            raise DataError(f"chat template: it does not take one question and one answer ({error})") from error
        eos = str(self._tokenizer.special_tokens_map.get("eos_token", ""))
        end_of_turn = _common_start(after).rstrip().replace(EOS_MARK, eos)
        last = after[-1].rstrip()
        end_of_text = eos if not end_of_turn and EOS_MARK in last else ""
        lead = written[len(_common_start([opened, written])) : written.index(_mark(1))]
        return end_of_turn, end_of_text, lead

    def _after(self, mark: str, messages: Rendering, *, generation: bool = False) -> str:
        """What the template writes after a mark, with EOS_MARK for the eos token; more marks stay in it."""
        text = self.render(messages, generation=generation, eos_token=EOS_MARK)
        if text.count(mark) != 1:
            raise BadRowError(f"a text appears {text.count(mark)} times")
        return text[text.index(mark) + len(mark) :]

    def _skeleton(self, roles: Sequence[str], *, generation: bool = False) -> _Skeleton:
        key = (*roles, "generation") if generation else tuple(roles)
        if key not in self._skeletons:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = self._new_skeleton(roles, generation=generation)
        return self._skeletons[key]

    def _new_skeleton(self, roles: Sequence[str], *, generation: bool) -> _Skeleton:
        messages = [{"role": role, "content": _mark(index)} for index, role in enumerate(roles)]
        text = self.render(messages, generation=generation)
        found = list(_marks(text))
        seen = [index for index, _ in found]
        for index, role in enumerate(roles):
            if seen.count(index) != 1:
                times = "leaves out" if index not in seen else "repeats"
                raise LeftOutError(f"the chat template {times} the text of turn {index + 1} ({role})")
        literals, place = [], 0
        for index, start in found:
            literals.append(text[place:start])
            place = start + len(_mark(index))
        literals.append(text[place:])
        lead = [0] * len(literals)
        tail = [0] * len(literals)
        for k, index in enumerate(seen):
            if roles[index] == "assistant":
                before = _mark(seen[k - 1]) if k else ""
                lead[k] = len(literals[k]) - self._start(before, literals[k] + _mark(index), messages[:index])
                tail[k + 1] = self._tail(literals[k + 1])
        return _Skeleton(tuple(seen), tuple(literals), tuple(lead), tuple(tail))

    def _around_answers(self, mappings: Rendering, roles: _Skeleton) -> _Skeleton:
        """What the template writes around the answers of one dialogue, its other turns as they are.

        Args:
            mappings: the dialogue.
            roles: the skeleton of its roles, which knows what belongs to an answer besides its content.
        """
        marked = [
            {**message, "content": _mark(index)} if message["role"] == "assistant" else message
            for index, message in enumerate(mappings)
        ]
        text = self.render(marked)
        order, literals, lead, tail, place = [], [], [], [0], 0
        for index, start in _marks(text):
            literals.append(text[place:start])
            place = start + len(_mark(index))
            order.append(index)
            position = roles.order.index(index)
            lead.append(roles.lead[position])
            tail.append(roles.tail[position + 1])
        return _Skeleton(tuple(order), (*literals, text[place:]), (*lead, 0), tuple(tail))

    def _tail(self, following: str) -> int:
        """Characters of what follows an answer that end its turn."""
        if self._turn_marks:
            return next((len(mark) for mark in self._turn_marks if following.startswith(mark)), 0)
        return len(_common_start([self.end_of_turn, following]).rstrip())

    def _start(self, before: str, written: str, earlier: Rendering) -> int:
        """Where in `written`, which ends with an answer's mark and follows `before`, the model starts to speak."""
        length = written.index(MARK)
        if before and earlier:
            try:
                opened = self.render(earlier, generation=True)
            except BadRowError:
                opened = ""
            if opened.count(before) == 1:
                following = opened[opened.index(before) + len(before) :]
                return min(len(_common_start([following, written])), length)
        return length - (len(self._lead) if written[:length].endswith(self._lead) else 0)

    def _turn_span(self, text: str, mappings: Rendering, index: int, tools: Sequence[Mapping[str, Any]]) -> Span:
        """The learned stretch of one turn, found by replacing this turn alone."""
        if mappings[index].get("tool_calls"):
            return self._call_span(text, mappings, index, tools)
        marked = [dict(message) for message in mappings]
        marked[index] = {"role": "assistant", "content": _mark(index)}
        skeleton = self.render(marked, tools)
        if skeleton.count(_mark(index)) != 1:
            raise LeftOutError(f"the chat template leaves out or repeats turn {index + 1} (assistant)")
        start = skeleton.index(_mark(index))
        after = skeleton[start + len(_mark(index)) :]
        start = self._opening(skeleton, start, mappings[:index], tools, self._lead)
        end = len(text) - len(after)
        if not text.startswith(skeleton[:start]) or not text.endswith(after) or end < start:
            raise BadRowError(f"the chat template rewrites other turns depending on turn {index + 1} (assistant)")
        return start, end + self._tail(after)

    def _call_span(self, text: str, mappings: Rendering, index: int, tools: Sequence[Mapping[str, Any]]) -> Span:
        """The learned stretch of a turn that calls tools, found by putting one call named by a mark in their place."""
        turn = f"turn {index + 1} (assistant)"
        calls = mappings[index]["tool_calls"]
        marked = [dict(message) for message in mappings]
        marked[index]["tool_calls"] = [_marked_call(index, calls[0])]
        skeleton = self.render(marked, tools)
        if skeleton.count(_mark(index)) != 1:
            raise LeftOutError(f"the chat template leaves out or repeats the tool call of {turn}")
        if not self.end_of_turn:
            raise BadRowError(f"the chat template ends no turn, so the end of the tool call of {turn} is unknown")
        start = skeleton.index(_mark(index))
        after = skeleton[start + len(_mark(index)) :]
        start = self._opening(skeleton, start, mappings[:index], tools, self._call_lead(calls[0]))
        # The call in the skeleton has no arguments, so the first end of a turn after it is its own.
        _, found, rest = after.partition(self.end_of_turn)
        end = len(text) - len(rest)
        if not found or not text.startswith(skeleton[:start]) or not text.endswith(rest) or end < start:
            raise BadRowError(f"the chat template rewrites other turns depending on {turn}")
        for call in calls:
            if call["function"]["name"] not in text[start:end]:
                raise LeftOutError(f"the chat template leaves out a tool call of {turn}")
        return start, end

    def _call_lead(self, call: Mapping[str, Any]) -> str:
        """What the assistant says before the name of a tool that it calls."""
        asked = {"role": "user", "content": "a"}
        try:
            opened = self.render([asked], generation=True)
            called = {"role": "assistant", "content": "", "tool_calls": [_marked_call(0, call)]}
            written = self.render([asked, called])
        except BadRowError:
            return ""
        before = written.partition(_mark(0))[0]
        return before[len(_common_start([opened, before])) :]

    def _opening(
        self, skeleton: str, start: int, earlier: Rendering, tools: Sequence[Mapping[str, Any]], lead: str
    ) -> int:
        """Where in `skeleton`, at `start` or a little before, the model starts to speak."""
        if earlier:
            try:
                opened = self.render(earlier, tools, generation=True)
            except BadRowError:
                opened = ""
            if len(opened) <= start and skeleton.startswith(opened) and opened:
                return len(opened)
        return start - (len(lead) if skeleton[:start].endswith(lead) else 0)


def _as_mapping(message: Message) -> dict[str, Any]:
    """A message as templates see it."""
    mapping: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        mapping["content"] = _with_images(message.content)
    if message.tool_calls:
        mapping["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id is not None:
        mapping["tool_call_id"] = message.tool_call_id
    return mapping


def _marked_call(index: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """A call without arguments whose name is a mark."""
    named = {"type": "function", "function": {"name": _mark(index), "arguments": {}}}
    return {**named, "id": like["id"]} if "id" in like else named


def _require_kept(text: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """See that the names of all tools and all that is not the assistant's stand in the rendered text.

    What the assistant says is looked for where its turn is found; a template may drop its thoughts.
    """
    for tool in tools:
        if tool["function"]["name"] not in text:
            raise LeftOutError(f"the chat template leaves out the tools ({tool['function']['name']})")
    for index, message in enumerate(messages):
        content = message.content.strip()
        if message.role == "assistant" or content in text:
            continue
        # Llama writes results of tools as JSON.
        if json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            raise LeftOutError(f"the chat template leaves out the text of turn {index + 1} ({message.role})")


def _with_images(content: str) -> list[dict[str, Any]]:
    """A text with IMAGE_MARKs as the parts that templates of vision models take."""
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(content.split(IMAGE_MARK)):
        if index:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _require_shown(text: str, messages: Sequence[Message]) -> None:
    """See that what turns with images say stands in the rendered text; templates may strip each part."""
    for index, message in enumerate(messages):
        for part in message.content.split(IMAGE_MARK) if message.images else ():
            if part.strip() not in text:
                raise LeftOutError(f"the chat template leaves out the text of turn {index + 1} ({message.role})")


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(message["content"], list):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _mark(index: int) -> str:
    return f"{MARK}{index}{MARK_END}"


def _marks(text: str) -> Iterator[tuple[int, int]]:
    """(index, start) of each mark in a skeleton."""
    start = text.find(MARK)
    while start >= 0:
        end = text.index(MARK_END, start)
        yield int(text[start + 1 : end]), start
        start = text.find(MARK, end)


def _walk(text: str, messages: Sequence[Message], skeleton: _Skeleton) -> list[Span] | None:
    """The learned spans, if `text` is the skeleton with the contents (as they are, or stripped) in it."""
    spans, place = [], 0
    for k, index in enumerate(skeleton.order):
        literal = skeleton.literals[k]
        if not text.startswith(literal, place):
            return None
        place += len(literal)
        content, following = messages[index].content, skeleton.literals[k + 1]
        end = _end_of_content(text, place, content, following)
        if end is None:
            return None
        if messages[index].learn:
            spans.append((place - skeleton.lead[k], end + skeleton.tail[k + 1]))
        place = end
    if text[place:] != skeleton.literals[-1]:
        return None
    return sorted(spans)


def _end_of_content(text: str, place: int, content: str, following: str) -> int | None:
    for candidate in (content, content.strip(), content.rstrip(), content.lstrip()):
        end = place + len(candidate)
        if text.startswith(candidate, place) and text.startswith(following, end):
            return end
    return None


def _common_start(texts: Sequence[str]) -> str:
    """The longest text with which all of `texts` start."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _mask(encoding: Any, text: str, spans: Sequence[Span]) -> Mask:
    """True for the tokens that start inside a span; bool [T].

    Asks the encoding for the few borders: taking all its offsets over to Python costs as much as half of tokenising.
    """
    mask = np.zeros(len(encoding), dtype=np.bool_)
    for start, end in spans:
        mask[_token_from(encoding, text, start) : _token_from(encoding, text, end)] = True
    return mask


def _token_from(encoding: Any, text: str, place: int) -> int:
    """Number of the first token that starts at character `place` or after it."""
    for character in range(place, len(text)):
        token = encoding.char_to_token(character)
        if token is not None:  # None: the tokenizer drops this character
            start, _ = encoding.token_to_chars(token)
            return int(token) + int(start < place)
    num_tokens: int = len(encoding)
    return num_tokens
