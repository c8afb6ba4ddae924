//! The border: check what Python hands over, release the GIL, call, translate errors. No arithmetic.

#![deny(unsafe_code)] // but for `borrow`
#![allow(clippy::needless_pass_by_value, reason = "Python hands its arguments over by value")]

mod borrow;
mod build_info;
mod byte_level;
mod device;
mod gate;
mod header;
mod merge;
mod nf4;
mod read;
mod rename;
mod run_plan;
mod shards;
mod write;

use pyo3::prelude::*;

/// `fastft._native`; its types and docs stand in `python/fastft/_native.pyi`.
#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::build_info::build_info;
    #[pymodule_export]
    use crate::byte_level::{ByteLevel, ByteLevelScan};
    #[pymodule_export]
    use crate::header::{TensorInfo, read_header};
    #[pymodule_export]
    use crate::merge::{cast, merge_low_rank};
    #[pymodule_export]
    use crate::nf4::{code_book, dequantize_4bit, dequantize_scales, nested_map, quantize_4bit, quantize_scales};
    #[pymodule_export]
    use crate::read::read_into;
    #[pymodule_export]
    use crate::rename::{rename_exchange, rename_noreplace};
    #[pymodule_export]
    use crate::run_plan::{block_maxima, run_plan};
    #[pymodule_export]
    use crate::shards::split_into_shards;
    #[pymodule_export]
    use crate::write::write_file;
}
