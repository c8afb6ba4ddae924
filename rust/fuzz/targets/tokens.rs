//! Any texts cut by any tokenizer: the pieces are the text again, and each token knows whether it is learned.
#![no_main]

use arbitrary::Arbitrary;
use fastft_tokens::{Added, BLOCK, Pattern, Shape, Tokenizer, Words};
use libfuzzer_sys::fuzz_target;

/// Ids of the tokens that stand for a byte each; added tokens come behind them.
const BYTES: u32 = 256;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    pattern: u8,
    prepends: bool,
    joiners: Vec<char>,
    added: Vec<&'a str>,
    classes: u8,
    texts: Vec<&'a str>,
    spans: Vec<(u8, u8)>,
}

fn tokenizer(input: &Input) -> Tokenizer {
    let numbered = input.added.iter().take(8).zip(BYTES..);
    let added = Added::new(numbered.map(|(content, id)| ((*content).to_owned(), id)).collect());
    let mut shapes = vec![Shape { bytes: 1, lead: 0, trail: 0 }; BYTES as usize];
    shapes.extend(input.added.iter().take(8).map(|content| Shape {
        bytes: u16::try_from(content.len()).unwrap_or(u16::MAX),
        lead: 0,
        trail: 0,
    }));
    let pattern = [Pattern::Gpt2, Pattern::Qwen2, Pattern::Llama3];
    match pattern.get(usize::from(input.pattern % 4)) {
        Some(pattern) => Tokenizer::new(*pattern, added, Added::default(), shapes),
        None => Tokenizer::of_words(Words { joiners: input.joiners.clone(), prepends: input.prepends }, added, shapes),
    }
}

fuzz_target!(|input: Input| {
    let mut tokenizer = tokenizer(&input);
    let mut spans: Vec<Vec<(usize, usize)>> = vec![Vec::new(); input.texts.len()];
    for (spans, (start, end)) in spans.iter_mut().zip(&input.spans) {
        spans.push((usize::from(*start), usize::from(*end)));
    }
    for _ in 0..300 {
        let Ok(scan) = tokenizer.scan(&input.texts, &spans, 1) else { return };
        if !scan.blocks.is_empty() {
            for block in &scan.blocks {
                let classes: Vec<u8> =
                    (0..BLOCK).map(|code| (code as u8).wrapping_mul(input.classes | 1) >> 6).collect();
                tokenizer.learn_block(*block, &classes).unwrap_or_else(|error| panic!("{error}"));
            }
            continue;
        }
        // A token per byte; the byte that stands for a prepended blank is the token 255, which no text has.
        let answers: Vec<Vec<u32>> =
            scan.asked.iter().map(|piece| piece.iter().map(|byte| u32::from(*byte)).collect()).collect();
        let Ok(encoded) = tokenizer.finish(&scan, &answers) else { return };
        assert_eq!(encoded.ids.len(), encoded.learned.len());
        assert_eq!(encoded.lengths.len(), input.texts.len());
        assert_eq!(encoded.lengths.iter().sum::<u64>(), encoded.ids.len() as u64);
        let mut next = encoded.ids.iter();
        for (index, (text, length)) in input.texts.iter().zip(&encoded.lengths).enumerate() {
            let mut bytes = Vec::new();
            for id in next.by_ref().take(usize::try_from(*length).unwrap_or(0)) {
                match id.checked_sub(BYTES) {
                    Some(added) => bytes.extend_from_slice(input.added[added as usize].as_bytes()),
                    None if *id == 0xff => {}
                    None => bytes.push(*id as u8),
                }
            }
            if !scan.refused.contains(&index) {
                assert_eq!(bytes, text.as_bytes());
            }
        }
        return;
    }
    panic!("the blocks of the texts are never all known");
});
