//! Tokens of many texts at once.
//!
//! A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen, GLM-4) cuts a text at its added tokens, cuts what is between them into pieces by a regular expression, and
//! merges the bytes of each piece by itself. So the tokens of a piece never change: a data set has some ten thousand
//! different pieces, and each is asked for once. What is new here is only the cutting; the tokens of a piece come from
//! the tokenizer itself (through Python), as do the classes of characters, whatever Unicode version it knows.
//!
//! Tokenizers of `SentencePiece`'s kind (Llama 2, Mistral, `InternLM`) merge a whole text. It is cut where none of their
//! merges can reach over, see [`Words`]; the rest is the same.
//!
//! Numbers in, numbers out: no files, no Python, no unsafe code.
#![forbid(unsafe_code)]

mod added;
mod classes;
mod scan;
mod split;

pub use added::Added;
pub use classes::{BLOCK, Classes};
pub use scan::{Encoded, Scan, Shape, Tokenizer};
pub use split::{Pattern, Words};
