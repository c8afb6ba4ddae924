//! The split into shards for Python.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Indices of `sizes` (bytes) by shard of at most `max_shard_size` bytes, in the order of `huggingface_hub`.
#[pyfunction]
pub fn split_into_shards(sizes: Vec<u64>, max_shard_size: u64) -> PyResult<Vec<Vec<usize>>> {
    if max_shard_size == 0 {
        return Err(PyValueError::new_err("split_into_shards: max_shard_size is 0; give at least 1 byte"));
    }
    Ok(fastft_checkpoint::split_into_shards(&sizes, max_shard_size))
}
