//! The border: check what Python hands over, release the GIL, call, translate errors. No arithmetic.

#![forbid(unsafe_code)]
#![allow(clippy::needless_pass_by_value, reason = "Python hands its arguments over by value")]

mod build_info;
mod gate;
mod header;
mod rename;
mod run_plan;
mod shards;

use pyo3::prelude::*;

/// `fastft._native`; its types and docs stand in `python/fastft/_native.pyi`.
#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::build_info::build_info;
    #[pymodule_export]
    use crate::header::{TensorInfo, read_header};
    #[pymodule_export]
    use crate::rename::{rename_exchange, rename_noreplace};
    #[pymodule_export]
    use crate::run_plan::{block_maxima, run_plan};
    #[pymodule_export]
    use crate::shards::split_into_shards;
}
