//! Bytes of a file into an array of Python.

use std::path::PathBuf;

use fastft_checkpoint::Input;
use pyo3::prelude::*;

use crate::borrow::Loans;
use crate::gate::{to_python, without_gil, workers};

/// Fills `target` with the bytes of the file at `path` from `offset` on.
#[pyfunction]
#[pyo3(signature = (path, offset, target, *, threads=None))]
pub fn read_into(
    py: Python,
    path: PathBuf,
    offset: u64,
    target: &Bound<PyAny>,
    threads: Option<usize>,
) -> PyResult<()> {
    let (_, threads) = workers(py, "read_into", threads)?;
    let loans = Loans::default();
    let target = loans.exclusive::<u8>(target, "read_into: target")?;
    let done = without_gil(py, || fastft_checkpoint::read_into(&Input::open(&path)?, offset, target, threads))?;
    done.map_err(|error| to_python(py, &error))
}
