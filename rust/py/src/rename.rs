//! Renames that never destroy what they meet, for `fastft.publish`.

use std::io;
use std::path::{Path, PathBuf};

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

use crate::gate::without_gil;

/// Renames `src` to `dst`; `FileExistsError` if there is a `dst`.
#[pyfunction]
pub fn rename_noreplace(py: Python, src: PathBuf, dst: PathBuf) -> PyResult<()> {
    without_gil(py, || fastft_checkpoint::rename_noreplace(&src, &dst))?.map_err(|error| os_error(&error, &src, &dst))
}

/// Puts `a` and `b` into each other's place in one step.
#[pyfunction]
pub fn rename_exchange(py: Python, a: PathBuf, b: PathBuf) -> PyResult<()> {
    without_gil(py, || fastft_checkpoint::rename_exchange(&a, &b))?.map_err(|error| os_error(&error, &a, &b))
}

/// `OSError` with number and both names: Python chooses the subclass by the number.
fn os_error(error: &io::Error, first: &Path, second: &Path) -> PyErr {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default().to_owned();
    PyOSError::new_err((error.raw_os_error(), text, first.to_owned(), None::<i32>, second.to_owned()))
}
