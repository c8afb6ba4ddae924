//! A device for merges that Python drives: calls `prepare`, `merge` and `finish` of an object.

use std::sync::{Mutex, PoisonError};

use fastft_convert::device::{Band, Device, Right};
use fastft_convert::{Error, Result};
use fastft_kernels::Element;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

/// The object, and what it raised.
pub struct PythonDevice {
    object: Py<PyAny>,
    raised: Mutex<Option<PyErr>>,
}

impl PythonDevice {
    /// Drives `object`.
    pub fn new(object: Py<PyAny>) -> Self {
        Self { object, raised: Mutex::new(None) }
    }

    /// What the object raised first.
    pub fn take_raised(&self) -> Option<PyErr> {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn call<T: Send>(&self, work: impl FnOnce(Python, &Bound<PyAny>) -> PyResult<T> + Send) -> Result<T> {
        Python::attach(|py| work(py, self.object.bind(py))).map_err(|error| {
            let text = error.to_string();
            self.raised.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            Error::Plan(format!("the device failed: {text}"))
        })
    }
}

impl Device for PythonDevice {
    fn prepare(&self, tensor: &str, rights: &[Right]) -> Result<()> {
        self.call(|py, object| {
            let rights = rights
                .iter()
                .map(|right| (PyBytes::new(py, &bytes(right.values)), right.rank, right.transposed).into_pyobject(py));
            let rights = PyList::new(py, rights.collect::<PyResult<Vec<Bound<PyTuple>>>>()?)?;
            object.call_method1("prepare", (tensor, rights)).map(drop)
        })
    }

    fn merge(&self, band: &Band, base: Option<&[u8]>, target: &mut [u8]) -> Result<bool> {
        self.call(|py, object| {
            let products = band.products.iter().map(|left| {
                (left.right, PyBytes::new(py, &bytes(&left.values)), left.rank, left.scale).into_pyobject(py)
            });
            let products = PyList::new(py, products.collect::<PyResult<Vec<Bound<PyTuple>>>>()?)?;
            let shape = (band.rows, band.columns);
            let dtypes = (name(band.from), name(band.to));
            let base = PyBytes::new(py, base.unwrap_or(target));
            let done = object.call_method1("merge", (band.tensor, shape, dtypes, base, products, band.round_delta))?;
            let (merged, kept): (Bound<PyBytes>, bool) = done.extract()?;
            if merged.as_bytes().len() != target.len() {
                return Err(pyo3::exceptions::PyValueError::new_err("the device gave another number of bytes"));
            }
            target.copy_from_slice(merged.as_bytes());
            Ok(kept)
        })
    }

    fn finish(&self, tensor: &str) {
        // What it raises is kept, and raised when the run is over.
        let _ = self.call(|_, object| object.call_method1("finish", (tensor,)).map(drop));
    }
}

fn name(element: Element) -> &'static str {
    match element {
        Element::F32 => "F32",
        Element::F16 => "F16",
        Element::Bf16 => "BF16",
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
