//! Runs a plan: for each output tensor its name, dtype, shape and the operation that makes it from ranges of files.
//!
//! Python decides what ([`plan`]); here it is checked against the files ([`job`]) and streamed ([`stream`]): every
//! worker reads a tile by position, computes in the buffer and writes it, so that memory is bounded by the number of
//! workers and not by the size of the model.

#![forbid(unsafe_code)]

mod content;
pub mod device;
mod dora;
pub mod job;
mod merge;
pub mod plan;
mod quantize;
mod shared;
pub mod stream;
mod tile;

pub use fastft_checkpoint::{Error, Result};
pub use job::Job;
pub use plan::Plan;
pub use stream::{Limits, Outcome, Progress, run, scales};
