//! Cutting a text into pieces, as the regular expressions of the tokenizers do it.
//!
//! # Source
//! The patterns in the `tokenizer.json` of the model families, and the one in the `ByteLevel` pre-tokenizer of Hugging
//! Face's tokenizers 0.22; they differ in few places, which are the fields of [`Rules`].

use crate::classes::{Class, Classes};

/// The regular expressions that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    Qwen2,
    /// The same with `\p{N}{1,3}`.
    Llama3,
}

/// The sign by which `SentencePiece` writes a blank.
const BLANK: char = '\u{2581}';

/// How a tokenizer of `SentencePiece`'s kind is cut, which merges a whole text: before a blank that no token can have
/// behind the character in front of it. No merge reaches over such a place, so each side is merged as it would be alone.
#[derive(Debug, Clone, Default)]
pub struct Words {
    /// Characters that stand before a blank inside some token.
    pub joiners: Vec<char>,
    /// Whether a blank is put before each text between added tokens.
    pub prepends: bool,
}

impl Words {
    /// The end of the piece that starts at byte `start` of `text`, which is not its end.
    ///
    /// # Errors
    /// [`Stop::Blank`].
    pub fn piece_end(&self, text: &str, start: usize) -> Result<usize, Stop> {
        let mut before = BLANK;
        for (place, character) in text[start..].char_indices() {
            if character == BLANK {
                return Err(Stop::Blank);
            }
            if character == ' ' && before != BLANK && !self.joiners.contains(&before) {
                return Ok(start + place);
            }
            before = if character == ' ' { BLANK } else { character };
        }
        Ok(text.len())
    }
}

/// Why a text is not cut here.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// The sign of a blank stands in the text itself, where it is another length than a blank.
    Blank,
    /// A block of characters is not known yet.
    Block(usize),
    /// A long s after an apostrophe, which some engines take for an s when case does not matter.
    LongS,
}

/// A text at a place.
struct Cursor<'a> {
    bytes: &'a str,
    classes: &'a Classes,
}

impl Cursor<'_> {
    /// The character at a place with its class; None at the end.
    fn at(&self, place: usize) -> Result<Option<(char, Class)>, Stop> {
        let Some(character) = self.bytes[place..].chars().next() else { return Ok(None) };
        let class = self.classes.of(character).map_err(Stop::Block)?;
        Ok(Some((character, class)))
    }

    /// The end of a run of one class that starts at `place`, of at most `most` characters.
    fn run(&self, mut place: usize, class: Class, most: usize) -> Result<usize, Stop> {
        for _ in 0..most {
            match self.at(place)? {
                Some((character, found)) if found == class => place += character.len_utf8(),
                _ => break,
            }
        }
        Ok(place)
    }

    fn class_at(&self, place: usize) -> Result<Option<Class>, Stop> {
        Ok(self.at(place)?.map(|(_, class)| class))
    }
}

/// The end of the piece that starts at byte `start` of `text`, which is not its end.
///
/// # Errors
/// See [`Stop`].
pub fn piece_end(pattern: Pattern, classes: &Classes, text: &str, start: usize) -> Result<usize, Stop> {
    let cursor = Cursor { bytes: text, classes };
    let Some((first, class)) = cursor.at(start)? else { return Ok(start) };
    let second = start + first.len_utf8();
    if first == '\''
        && let Some(end) = contraction(pattern, text, second)?
    {
        return Ok(end);
    }
    match pattern {
        Pattern::Gpt2 => {
            // ` ?` before letters, numbers or signs.
            let (body, kind) = match (first, cursor.class_at(second)?) {
                (' ', Some(next)) if next != Class::Space => (second, next),
                _ => (start, class),
            };
            if kind == Class::Space { white_space(&cursor, start) } else { cursor.run(body, kind, usize::MAX) }
        }
        Pattern::Qwen2 | Pattern::Llama3 => {
            if class == Class::Letter {
                return cursor.run(second, Class::Letter, usize::MAX);
            }
            if class == Class::Number {
                return cursor.run(start, Class::Number, if pattern == Pattern::Qwen2 { 1 } else { 3 });
            }
            let next = cursor.class_at(second)?;
            if !is_line_end(first) && next == Some(Class::Letter) {
                return cursor.run(second, Class::Letter, usize::MAX);
            }
            let signs = if class == Class::Other {
                start
            } else if first == ' ' && next == Some(Class::Other) {
                second
            } else {
                return white_space_by_lines(&cursor, start);
            };
            let mut end = cursor.run(signs, Class::Other, usize::MAX)?;
            while text.as_bytes().get(end).is_some_and(|&byte| byte == b'\r' || byte == b'\n') {
                end += 1;
            }
            Ok(end)
        }
    }
}

fn is_line_end(character: char) -> bool {
    character == '\r' || character == '\n'
}

/// The end of `s`, `t`, `m`, `d`, `re`, `ve` or `ll` at `place`, behind an apostrophe.
fn contraction(pattern: Pattern, text: &str, place: usize) -> Result<Option<usize>, Stop> {
    let mut following = text[place..].chars();
    let Some(first) = following.next() else { return Ok(None) };
    let any_case = pattern != Pattern::Gpt2;
    if any_case && first == '\u{17f}' {
        return Err(Stop::LongS);
    }
    let fold = |character: char| if any_case { character.to_ascii_lowercase() } else { character };
    let end = match (fold(first), following.next().map(fold)) {
        ('s' | 't' | 'm' | 'd', _) => Some(place + 1),
        ('r' | 'v', Some('e')) | ('l', Some('l')) => Some(place + 2),
        _ => None,
    };
    Ok(end)
}

/// `\s+(?!\S)|\s+`: all white space, but for the last sign of it where more text follows.
fn white_space(cursor: &Cursor, start: usize) -> Result<usize, Stop> {
    let end = cursor.run(start, Class::Space, usize::MAX)?;
    let last = cursor.bytes[start..end].chars().next_back().map_or(0, char::len_utf8);
    Ok(if end < cursor.bytes.len() && end - last > start { end - last } else { end })
}

/// `\s*[\r\n]+|\s+(?!\S)|\s+`: to the last line end in the white space, if there is one.
fn white_space_by_lines(cursor: &Cursor, start: usize) -> Result<usize, Stop> {
    let end = cursor.run(start, Class::Space, usize::MAX)?;
    match cursor.bytes[start..end].rfind(['\r', '\n']) {
        Some(place) => Ok(start + place + 1),
        None => white_space(cursor, start),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by it")]
    use super::{Pattern, Stop, piece_end};
    use crate::classes::{BLOCK, Classes};

    /// Classes of the first block by Rust's own tables, which agree with any Unicode version on these.
    pub fn latin() -> Classes {
        let classes: Vec<u8> = (0..u32::try_from(BLOCK).unwrap_or(0))
            .map(|code| match char::from_u32(code) {
                Some(c) if c.is_alphabetic() => 1,
                Some(c) if c.is_numeric() => 2,
                Some(c) if c.is_whitespace() => 3,
                _ => 0,
            })
            .collect();
        let mut known = Classes::default();
        known.learn(0, &classes).unwrap();
        known
    }

    fn pieces(pattern: Pattern, text: &str) -> Vec<&str> {
        let classes = latin();
        let mut start = 0;
        let mut found = Vec::new();
        while start < text.len() {
            let end = piece_end(pattern, &classes, text, start).unwrap();
            assert!(end > start);
            found.push(&text[start..end]);
            start = end;
        }
        found
    }

    /// The expected pieces are those of Python's `regex` module (2026.11) with the patterns as they stand.
    #[test]
    fn pieces_are_those_of_the_regular_expressions() {
        let text = "It's 12345  apples,\n\n  he'LL say: \u{e9}t\u{e9}!\r\n x  ";
        assert_eq!(
            pieces(Pattern::Gpt2, text),
            [
                "It",
                "'s",
                " 12345",
                " ",
                " apples",
                ",",
                "\n\n ",
                " he",
                "'",
                "LL",
                " say",
                ":",
                " \u{e9}t\u{e9}",
                "!",
                "\r\n",
                " x",
                "  "
            ]
        );
        assert_eq!(
            pieces(Pattern::Qwen2, text),
            [
                "It",
                "'s",
                " ",
                "1",
                "2",
                "3",
                "4",
                "5",
                " ",
                " apples",
                ",\n\n",
                " ",
                " he",
                "'LL",
                " say",
                ":",
                " \u{e9}t\u{e9}",
                "!\r\n",
                " x",
                "  "
            ]
        );
        assert_eq!(pieces(Pattern::Llama3, "1234 56"), ["123", "4", " ", "56"]);
        assert_eq!(pieces(Pattern::Qwen2, " \n \n  a\tb"), [" \n \n", " ", " a", "\tb"]);
        assert_eq!(pieces(Pattern::Gpt2, " \n \n  a\tb"), [" \n \n ", " a", "\t", "b"]);
    }

    #[test]
    fn what_is_not_known_is_said() {
        let classes = latin();
        assert_eq!(piece_end(Pattern::Gpt2, &classes, "a\u{4f60}", 0), Err(Stop::Block(4)));
        assert_eq!(piece_end(Pattern::Qwen2, &classes, "'\u{17f}", 0), Err(Stop::LongS));
        assert_eq!(piece_end(Pattern::Gpt2, &classes, "'\u{17f}", 0), Ok(1));
    }
}
