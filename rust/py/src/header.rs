//! Safetensors headers for Python.

use std::path::PathBuf;

use fastft_checkpoint::Header;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::gate::{to_python, without_gil};

/// A tensor in a file.
#[pyclass(frozen, eq, module = "fastft._native")]
#[derive(PartialEq, Eq)]
pub struct TensorInfo {
    #[pyo3(get)]
    name: String,
    #[pyo3(get)]
    dtype: &'static str,
    shape: Vec<u64>,
    #[pyo3(get)]
    offset: u64,
    #[pyo3(get)]
    nbytes: u64,
}

#[pymethods]
impl TensorInfo {
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    fn __repr__(&self) -> String {
        let Self { name, dtype, shape, offset, nbytes } = self;
        format!("TensorInfo(name={name:?}, dtype={dtype:?}, shape={shape:?}, offset={offset}, nbytes={nbytes})")
    }
}

/// The tensors of the safetensors file at `path`, in the order of their data.
#[pyfunction]
pub fn read_header(py: Python, path: PathBuf) -> PyResult<Vec<TensorInfo>> {
    let header = without_gil(py, move || Header::open(&path))?.map_err(|error| to_python(py, &error))?;
    let tensors = header.tensors.into_iter();
    Ok(tensors
        .map(|tensor| TensorInfo {
            name: tensor.name,
            dtype: tensor.dtype.name(),
            shape: tensor.shape,
            offset: tensor.offset,
            nbytes: tensor.nbytes,
        })
        .collect())
}
