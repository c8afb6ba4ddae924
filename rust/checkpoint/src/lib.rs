//! Files of weights in and out: safetensors headers, positioned reads, the split into shards, growing writes, renames.
//!
//! Nothing read is trusted: a header is bounded and checked before a byte of data is touched, and only regular files
//! are opened. Files are read by position, never mapped: a mapped file that is cut short kills the process.

#![forbid(unsafe_code)]

mod batch;
mod dtype;
mod error;
mod foreign;
mod header;
mod json;
mod layout;
mod memory;
mod reader;
mod rename;
mod shards;
mod writer;

pub use dtype::Dtype;
pub use error::{Error, Result};
pub use header::{Header, MAX_HEADER_BYTES, TensorInfo};
pub use layout::{Layout, Placed, TensorSpec};
pub use memory::{read_into, write_file};
pub use reader::Input;
pub use rename::{rename_exchange, rename_noreplace};
pub use shards::split_into_shards;
pub use writer::Output;
