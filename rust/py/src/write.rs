//! Arrays of Python into a safetensors file.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::OnceLock;

use fastft_checkpoint::{Dtype, TensorSpec};
use pyo3::prelude::*;

use crate::borrow::Loans;
use crate::gate::{array_error, to_python, without_gil, workers};

/// Name, dtype, shape and memory of a tensor.
type Tensor<'py> = (String, String, Vec<u64>, Bound<'py, PyAny>);

/// Writes the tensors into a new file at `path`; gives its size.
#[pyfunction]
#[pyo3(signature = (path, tensors, metadata, *, threads=None))]
pub fn write_file(
    py: Python,
    path: PathBuf,
    tensors: Vec<Tensor>,
    metadata: BTreeMap<String, String>,
    threads: Option<usize>,
) -> PyResult<u64> {
    let (_, threads) = workers(py, "write_file", threads)?;
    let loans = Loans::default();
    let mut specs = Vec::with_capacity(tensors.len());
    let mut data = Vec::with_capacity(tensors.len());
    for (name, dtype, shape, array) in &tensors {
        data.push(loans.shared::<u8>(array, &format!("tensor {name:?}"))?);
        let dtype = Dtype::from_name(dtype)
            .ok_or_else(|| array_error(py, &format!("tensor {name:?}: dtype {dtype} is not one of safetensors")))?;
        specs.push(TensorSpec { name: name.clone(), dtype, shape: shape.clone() });
    }
    let raised = OnceLock::new();
    let watch = || {
        Python::attach(|py| match py.check_signals() {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                let _ = raised.set(error);
                ControlFlow::Break(())
            }
        })
    };
    let done = without_gil(py, || fastft_checkpoint::write_file(&path, &specs, &data, &metadata, threads, &watch))?;
    if let Some(error) = raised.into_inner() {
        return Err(error);
    }
    done.map_err(|error| to_python(py, &error))
}
