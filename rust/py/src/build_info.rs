//! What was built and what it runs on.

use fastft_kernels::Cpu;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::gate::num_cores;

/// Version, CPU level, threads and, if known when it was built, the commit.
#[pyfunction]
pub fn build_info(py: Python) -> PyResult<Bound<PyDict>> {
    let cpu = Cpu::chosen().map_err(|error| PyValueError::new_err(error.to_string()))?;
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("level", cpu.level().name())?;
    info.set_item("threads", num_cores())?;
    info.set_item("commit", option_env!("FASTFT_COMMIT"))?;
    Ok(info)
}
