//! Numbers in, numbers out: the arithmetic of fastft, with no files and no Python.
//!
//! Each kernel is a folder: `mod.rs` checks sizes and chooses, `scalar.rs` is the specification in plain loops, the
//! other files are variants for a CPU level that agree with it bit for bit. The level is chosen once, in [`level`].
//! This is the only crate of the workspace in which `unsafe` may stand, but for the border's `borrow.rs`.

pub mod cast;
pub mod dora;
pub mod element;
pub mod finite;
pub mod level;
pub mod merge;
pub mod nf4;
pub mod parallel;

// The runner of all levels once more, as part of this crate: here `Level::Neon` is compiled on any CPU.
#[cfg(test)]
extern crate self as fastft_kernels;
#[cfg(test)]
#[path = "../tests/levels.rs"]
mod levels;

pub use element::Element;
pub use level::{Cpu, Level, LevelError};
