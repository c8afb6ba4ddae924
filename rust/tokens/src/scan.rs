//! Texts to tokens in two steps: what is known is looked up, what is not is asked for, then all is put together.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::thread;

use crate::added::Added;
use crate::classes::Classes;
use crate::split::{Pattern, Stop, Words, piece_end};

/// Pieces whose tokens are remembered; a data set has some ten thousand different ones.
const MOST_KNOWN: usize = 1 << 21;
/// Longer pieces are not remembered: they hardly come again.
const LONGEST_KNOWN_BYTES: usize = 256;
/// Set in an item that is the number of a piece to be asked for instead of a token.
const ASKED: u32 = 1 << 31;
/// An item that stands before the tokens of a piece with a blank put before it.
const PREPENDED: u32 = u32::MAX;
/// What the bytes of such a piece begin with, here and where they are asked for; no text has it.
const PREPENDED_BYTE: u8 = 0xff;
/// Bytes of text below which a second thread costs more than it brings.
const LEAST_BYTES: usize = 1 << 16;

/// What is known of a token for finding it in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of text that it stands for.
    pub bytes: u16,
    /// White space at its start that does not count as part of it.
    pub lead: u16,
    /// White space at its end that does not count as part of it.
    pub trail: u16,
}

/// A tokenizer with what it has learned so far.
#[derive(Debug)]
pub struct Tokenizer {
    cutting: Cutting,
    classes: Classes,
    /// Added tokens that are looked for first, and those looked for in what is left.
    added: [Added; 2],
    shapes: Vec<Shape>,
    known: HashMap<Box<[u8]>, (u32, u32)>,
    tokens: Vec<u32>,
}

/// How the text between added tokens is cut.
#[derive(Debug)]
enum Cutting {
    Pattern(Pattern),
    Words(Words),
}

/// What one look at some texts found; it holds no text any more.
#[derive(Debug, Default)]
pub struct Scan {
    /// Per text: tokens, and pieces to be asked for.
    texts: Vec<Vec<u32>>,
    /// Per text: starts and ends of what is learned, in bytes.
    borders: Vec<Vec<usize>>,
    /// Pieces whose tokens are not known, each once.
    pub asked: Vec<Box<[u8]>>,
    /// Blocks of characters that are not known: nothing else here is of use then; learn them and scan again.
    pub blocks: BTreeSet<usize>,
    /// Texts that cannot be done here and get no tokens.
    pub refused: Vec<usize>,
}

/// Tokens of texts, one text after the other.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Ids of the tokens.
    pub ids: Vec<u32>,
    /// Whether each token starts in a stretch that is learned: 1 or 0.
    pub learned: Vec<u8>,
    /// Tokens per text.
    pub lengths: Vec<u64>,
}

impl Tokenizer {
    /// A tokenizer that knows nothing but its added tokens and the shape of every token, by id.
    #[must_use]
    pub fn new(pattern: Pattern, first: Added, then: Added, shapes: Vec<Shape>) -> Self {
        Self::cut_by(Cutting::Pattern(pattern), [first, then], shapes)
    }

    /// The same for a tokenizer of `SentencePiece`'s kind, whose added tokens are all looked for first.
    #[must_use]
    pub fn of_words(words: Words, added: Added, shapes: Vec<Shape>) -> Self {
        Self::cut_by(Cutting::Words(words), [added, Added::default()], shapes)
    }

    fn cut_by(cutting: Cutting, added: [Added; 2], shapes: Vec<Shape>) -> Self {
        Self { cutting, classes: Classes::default(), added, shapes, known: HashMap::new(), tokens: Vec::new() }
    }

    /// Learns the classes of a block of characters, see [`Classes::learn`].
    ///
    /// # Errors
    /// As there.
    pub fn learn_block(&mut self, block: usize, classes: &[u8]) -> Result<(), String> {
        self.classes.learn(block, classes)
    }

    /// Cuts texts and looks up what is known.
    ///
    /// # Arguments
    /// `spans`: per text the stretches that are learned, start and end in characters, sorted and disjoint.
    ///
    /// # Errors
    /// There are not as many lists of spans as texts, or a span is outside its text.
    pub fn scan(&self, texts: &[&str], spans: &[Vec<(usize, usize)>], threads: usize) -> Result<Scan, String> {
        if texts.len() != spans.len() {
            return Err(format!("{} texts with {} lists of spans", texts.len(), spans.len()));
        }
        let num_bytes: usize = texts.iter().map(|text| text.len()).sum();
        let threads = threads.min(num_bytes / LEAST_BYTES).max(1);
        let share = texts.len().div_ceil(threads).max(1);
        let parts: Vec<Result<Scan, String>> = thread::scope(|scope| {
            let running: Vec<_> = texts
                .chunks(share)
                .zip(spans.chunks(share))
                .map(|(texts, spans)| scope.spawn(move || self.scan_part(texts, spans)))
                .collect();
            running
                .into_iter()
                .map(|part| part.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload)))
                .collect()
        });
        let mut all = Scan::default();
        let mut numbers: HashMap<Box<[u8]>, u32> = HashMap::new();
        for part in parts {
            all.join(part?, &mut numbers)?;
        }
        Ok(all)
    }

    fn scan_part(&self, texts: &[&str], spans: &[Vec<(usize, usize)>]) -> Result<Scan, String> {
        let mut scan = Scan::default();
        let mut numbers: HashMap<Cow<[u8]>, u32> = HashMap::new();
        for (index, (text, spans)) in texts.iter().zip(spans).enumerate() {
            scan.borders.push(borders(text, spans)?);
            let mut items = Vec::with_capacity(text.len() / 3);
            let cut = self.cut(text, 0, &mut |item| match item {
                Item::Token(id) => items.push(id),
                Item::Piece(piece) => {
                    if piece.first() == Some(&PREPENDED_BYTE) {
                        items.push(PREPENDED);
                    }
                    if let Some(&(start, end)) = self.known.get(&*piece) {
                        items.extend_from_slice(&self.tokens[start as usize..end as usize]);
                    } else {
                        let next = u32::try_from(numbers.len()).unwrap_or(ASKED - 2);
                        items.push(ASKED | *numbers.entry(piece).or_insert(next));
                    }
                }
            });
            match cut {
                Ok(()) => {}
                Err(Stop::Block(block)) => {
                    scan.blocks.insert(block);
                }
                Err(Stop::LongS | Stop::Blank) => {
                    scan.refused.push(index);
                    items.clear();
                }
            }
            scan.texts.push(items);
        }
        let mut asked: Vec<(Cow<[u8]>, u32)> = numbers.into_iter().collect();
        asked.sort_unstable_by_key(|&(_, number)| number);
        scan.asked = asked.into_iter().map(|(piece, _)| piece.into_owned().into_boxed_slice()).collect();
        Ok(scan)
    }

    /// Hands out the added tokens and the pieces of a text in their order.
    fn cut<'a>(&self, text: &'a str, stage: usize, take: &mut impl FnMut(Item<'a>)) -> Result<(), Stop> {
        let Some(added) = self.added.get(stage) else {
            let mut start = 0;
            while start < text.len() {
                let (end, prepended) = match &self.cutting {
                    Cutting::Pattern(pattern) => (piece_end(*pattern, &self.classes, text, start)?, false),
                    Cutting::Words(words) => (words.piece_end(text, start)?, words.prepends && start == 0),
                };
                let piece = &text.as_bytes()[start..end];
                take(Item::Piece(if prepended { [&[PREPENDED_BYTE], piece].concat().into() } else { piece.into() }));
                start = end;
            }
            return Ok(());
        };
        let mut rest = text;
        while let Some((place, length, id)) = added.find(rest) {
            self.cut(&rest[..place], stage + 1, take)?;
            take(Item::Token(id));
            rest = &rest[place + length..];
        }
        self.cut(rest, stage + 1, take)
    }

    /// Puts the tokens together and remembers the answers.
    ///
    /// # Arguments
    /// `answers`: the tokens of each piece in `scan.asked`.
    ///
    /// # Errors
    /// Another number of answers than of questions, or a token that the tokenizer does not have.
    pub fn finish(&mut self, scan: &Scan, answers: &[Vec<u32>]) -> Result<Encoded, String> {
        if answers.len() != scan.asked.len() {
            return Err(format!("{} answers to {} pieces", answers.len(), scan.asked.len()));
        }
        if let Some(id) = answers.iter().flatten().find(|&&id| id as usize >= self.shapes.len()) {
            return Err(format!("token {id} of a tokenizer with {} tokens", self.shapes.len()));
        }
        let mut encoded = Encoded::default();
        for (items, borders) in scan.texts.iter().zip(&scan.borders) {
            let start = encoded.ids.len();
            let mut prepended = Vec::new();
            for &item in items {
                if item == PREPENDED {
                    prepended.push(encoded.ids.len() - start);
                } else if item & ASKED == 0 {
                    encoded.ids.push(item);
                } else {
                    encoded.ids.extend_from_slice(&answers[(item & !ASKED) as usize]);
                }
            }
            let ids = &encoded.ids[start..];
            encoded.lengths.push(ids.len() as u64);
            self.mark(ids, &prepended, borders, &mut encoded.learned)?;
        }
        for (piece, tokens) in scan.asked.iter().zip(answers) {
            if self.known.len() < MOST_KNOWN && piece.len() <= LONGEST_KNOWN_BYTES {
                let range = (self.tokens.len(), self.tokens.len() + tokens.len());
                if let (Ok(start), Ok(end)) = (u32::try_from(range.0), u32::try_from(range.1)) {
                    self.tokens.extend_from_slice(tokens);
                    self.known.insert(piece.clone(), (start, end));
                }
            }
        }
        Ok(encoded)
    }

    /// Appends for each token whether it starts in a learned stretch.
    ///
    /// A border lies before the first token with text behind it, or after that token if it has text before it too: a
    /// token across a border belongs to the side on which it starts. White space at its ends is no text of a token.
    /// `prepended`: numbers of the tokens with a blank that the text does not have; one that is nothing else lies on the
    /// character behind it.
    fn mark(&self, ids: &[u32], prepended: &[usize], borders: &[usize], learned: &mut Vec<u8>) -> Result<(), String> {
        let mut open = false;
        let mut place = 0;
        let mut next = 0;
        let mut prepended = prepended.iter().peekable();
        for (number, &id) in ids.iter().enumerate() {
            let shape = self.shapes.get(id as usize).ok_or_else(|| format!("token {id} has no shape"))?;
            let is_prepended = prepended.next_if(|&&place| place == number).is_some();
            let bytes = usize::from(shape.bytes).saturating_sub(usize::from(is_prepended));
            let start = place + usize::from(shape.lead).min(bytes);
            let seen = if is_prepended { bytes.max(1) } else { bytes };
            let end = (place + seen).saturating_sub(usize::from(shape.trail)).max(start);
            // Borders before this token open or close it; those inside it do so for the next one.
            let mut inside = 0;
            while end > start && next < borders.len() && borders[next] < end {
                if start < borders[next] {
                    inside += 1;
                } else {
                    open = !open;
                }
                next += 1;
            }
            learned.push(u8::from(open));
            if inside % 2 == 1 {
                open = !open;
            }
            place += bytes;
        }
        Ok(())
    }
}

enum Item<'a> {
    Token(u32),
    Piece(Cow<'a, [u8]>),
}

impl Scan {
    /// Appends the scan of the texts that follow.
    fn join(&mut self, part: Self, numbers: &mut HashMap<Box<[u8]>, u32>) -> Result<(), String> {
        let before = self.texts.len();
        let mut renumbered = Vec::with_capacity(part.asked.len());
        for piece in part.asked {
            let next = u32::try_from(self.asked.len()).ok().filter(|&number| number < ASKED - 1);
            let next = next.ok_or("too many different pieces in one call")?;
            let number = *numbers.entry(piece.clone()).or_insert(next);
            if number == next {
                self.asked.push(piece);
            }
            renumbered.push(number);
        }
        for mut items in part.texts {
            for item in &mut items {
                if *item & ASKED != 0 && *item != PREPENDED {
                    *item = ASKED | renumbered[(*item & !ASKED) as usize];
                }
            }
            self.texts.push(items);
        }
        self.borders.extend(part.borders);
        self.blocks.extend(part.blocks);
        self.refused.extend(part.refused.into_iter().map(|index| before + index));
        Ok(())
    }
}

/// Starts and ends of the spans in bytes of the text, sorted.
fn borders(text: &str, spans: &[(usize, usize)]) -> Result<Vec<usize>, String> {
    let places: Vec<usize> = spans.iter().flat_map(|&(start, end)| [start, end]).collect();
    if !places.is_sorted() {
        return Err("the spans of a text are not sorted, or overlap".into());
    }
    if text.is_ascii() {
        if places.last().is_some_and(|&last| last > text.len()) {
            return Err(format!("a span ends at character {:?} of {}", places.last(), text.len()));
        }
        return Ok(places);
    }
    let mut starts = text.char_indices().map(|(place, _)| place).chain([text.len()]);
    let mut found = Vec::with_capacity(places.len());
    // Characters that have been taken from `starts`, and the byte at which the last of them starts.
    let (mut taken, mut byte) = (0, 0);
    for place in places {
        while taken <= place {
            byte = starts.next().ok_or_else(|| format!("a span ends at character {place}, behind the text"))?;
            taken += 1;
        }
        found.push(byte);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by it")]
    use proptest::prelude::*;

    use super::{Added, Encoded, Pattern, Shape, Tokenizer, borders};
    use crate::classes::BLOCK;

    /// One token per byte, 0 to 255; 256 is the added token `<a>`. Classes: lower case letters, blanks and line ends.
    fn bytes() -> Tokenizer {
        let mut shapes = vec![Shape { bytes: 1, lead: 0, trail: 0 }; 256];
        shapes[32] = Shape { bytes: 1, lead: 1, trail: 1 };
        shapes.push(Shape { bytes: 3, lead: 0, trail: 0 });
        let added = Added::new(vec![("<a>".into(), 256)]);
        let mut tokenizer = Tokenizer::new(Pattern::Gpt2, added, Added::default(), shapes);
        let classes = (0..BLOCK).map(|code| match u8::try_from(code) {
            Ok(b'a'..=b'z') => 1,
            Ok(b' ' | b'\n') => 3,
            _ => 0,
        });
        tokenizer.learn_block(0, &classes.collect::<Vec<u8>>()).unwrap();
        tokenizer
    }

    fn encode(tokenizer: &mut Tokenizer, texts: &[&str], spans: &[Vec<(usize, usize)>], threads: usize) -> Encoded {
        let scan = tokenizer.scan(texts, spans, threads).unwrap();
        let answers: Vec<Vec<u32>> =
            scan.asked.iter().map(|piece| piece.iter().map(|&byte| u32::from(byte)).collect()).collect();
        tokenizer.finish(&scan, &answers).unwrap()
    }

    #[test]
    fn added_tokens_and_pieces_come_in_order() {
        let mut tokenizer = bytes();
        for _ in 0..2 {
            let encoded = encode(&mut tokenizer, &["b<a>c", ""], &[vec![(1, 4)], vec![]], 1);
            assert_eq!(encoded.ids, [98, 256, 99]);
            assert_eq!(encoded.learned, [0, 1, 0]);
            assert_eq!(encoded.lengths, [3, 0]);
        }
        assert!(tokenizer.scan(&["b<a>c"], &[vec![]], 1).unwrap().asked.is_empty());
    }

    #[test]
    fn a_border_inside_a_token_counts_for_the_next() {
        let mut tokenizer = bytes();
        let marks = |tokenizer: &mut Tokenizer, spans| encode(tokenizer, &["<a>bc"], &[spans], 1).learned;
        assert_eq!(marks(&mut tokenizer, vec![(1, 4)]), [0, 1, 0]);
        assert_eq!(marks(&mut tokenizer, vec![(0, 1)]), [1, 0, 0]);
        assert_eq!(marks(&mut tokenizer, vec![(1, 2)]), [0, 0, 0]);
        assert_eq!(marks(&mut tokenizer, vec![(0, 3), (3, 5)]), [1, 1, 1]);
        assert_eq!(marks(&mut tokenizer, vec![(3, 3), (4, 5)]), [0, 0, 1]);
    }

    /// One token per byte of text, as `SentencePiece`'s words: a blank is token 32, one put before a text is token 32, too.
    #[test]
    fn words_are_cut_before_blanks() {
        use crate::split::Words;
        let words = |joiners: &str, prepends| {
            let words = Words { joiners: joiners.chars().collect(), prepends };
            let shapes = vec![Shape { bytes: 1, lead: 0, trail: 0 }; 256];
            Tokenizer::of_words(words, Added::new(vec![("<s>".into(), 1)]), shapes)
        };
        let pieces = |tokenizer: &Tokenizer, text: &str| {
            let scan = tokenizer.scan(&[text], &[vec![]], 1).unwrap();
            scan.asked.iter().map(|piece| String::from_utf8_lossy(piece).replace('\u{fffd}', "^")).collect::<Vec<_>>()
        };
        assert_eq!(pieces(&words("", false), "a bc  d "), ["a", " bc", "  d", " "]);
        assert_eq!(pieces(&words("\nc", false), "a\n bc  d"), ["a\n bc  d"]);
        assert_eq!(pieces(&words("", true), "a b<s> a<s>a"), ["^a", " b", "^ a"]);
        assert_eq!(words("", true).scan(&["a", "\u{2581}"], &[vec![], vec![]], 1).unwrap().refused, [1]);
    }

    #[test]
    fn a_blank_that_is_put_before_a_text_has_no_place_in_it() {
        use crate::split::Words;
        let words = Words { joiners: Vec::new(), prepends: true };
        let shapes = vec![Shape { bytes: 1, lead: 0, trail: 0 }; 256];
        let mut tokenizer = Tokenizer::of_words(words, Added::default(), shapes);
        for spans in [vec![(0, 1)], vec![(1, 2)], vec![(0, 2)]] {
            let scan = tokenizer.scan(&["ab"], std::slice::from_ref(&spans), 1).unwrap();
            // Known from the second time on.
            let answers = scan.asked.iter().map(|_| vec![32, 97, 98]).collect::<Vec<_>>();
            let encoded = tokenizer.finish(&scan, &answers).unwrap();
            assert_eq!(encoded.ids, [32, 97, 98]);
            let (first, second) = (u8::from(spans[0].0 == 0), u8::from(spans[0].1 == 2));
            assert_eq!(encoded.learned, [first, first, second]);
        }
    }

    #[test]
    fn spans_are_in_characters() {
        assert_eq!(borders("a\u{4f60}b", &[(1, 2)]), Ok(vec![1, 4]));
        assert_eq!(borders("a\u{4f60}b", &[(0, 3)]), Ok(vec![0, 5]));
        assert_eq!(borders("ab", &[(0, 1), (1, 2)]), Ok(vec![0, 1, 1, 2]));
        assert!(borders("a\u{4f60}b", &[(0, 4)]).is_err());
        assert!(borders("ab", &[(0, 3)]).is_err());
        assert!(borders("ab", &[(1, 0)]).is_err());
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut tokenizer = bytes();
        assert!(tokenizer.scan(&["a"], &[], 1).is_err());
        let scan = tokenizer.scan(&["a"], &[vec![]], 1).unwrap();
        assert!(tokenizer.finish(&scan, &[]).is_err());
        assert!(tokenizer.finish(&scan, &[vec![257]]).is_err());
        assert!(tokenizer.learn_block(0, &[0]).is_err());
        assert!(tokenizer.learn_block(9999, &[0; BLOCK]).is_err());
        assert!(tokenizer.learn_block(0, &[4; BLOCK]).is_err());
        let scan = tokenizer.scan(&["\u{4f60}", "\u{ff01}"], &[vec![], vec![]], 1).unwrap();
        assert_eq!(scan.blocks.into_iter().collect::<Vec<_>>(), [4, 15]);
    }

    proptest! {
        /// Bytes as tokens: the ids are the bytes, and each is learned if it lies in the span (blanks go with the next).
        #[test]
        fn ids_are_the_bytes_for_every_number_of_threads(
            texts in prop::collection::vec("[a-c \n.']{0,40}", 0..40), cut in 0usize..40, threads in 1usize..5
        ) {
            let mut tokenizer = bytes();
            let texts: Vec<String> = texts.iter().map(|text| text.repeat(if threads > 1 { 200 } else { 1 })).collect();
            let views: Vec<&str> = texts.iter().map(String::as_str).collect();
            let spans: Vec<Vec<(usize, usize)>> = views.iter().map(|text| vec![(cut.min(text.len()), text.len())]).collect();
            let encoded = encode(&mut tokenizer, &views, &spans, threads);
            let expected: Vec<u32> = texts.iter().flat_map(|text| text.bytes().map(u32::from)).collect();
            prop_assert_eq!(&encoded.ids, &expected);
            let lengths: Vec<u64> = texts.iter().map(|text| text.len() as u64).collect();
            prop_assert_eq!(&encoded.lengths, &lengths);
            let mut place = 0;
            for text in &texts {
                for (index, byte) in text.bytes().enumerate() {
                    if byte != b' ' {
                        prop_assert_eq!(encoded.learned[place + index], u8::from(index >= cut));
                    }
                }
                place += text.len();
            }
        }
    }
}
