//! A whole conversion in one call.

use std::ops::ControlFlow;

use fastft_convert::device::Device;
use fastft_convert::{Error, Job, Limits, Outcome, Plan, Progress, run, scales};
use fastft_kernels::Cpu;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::device::PythonDevice;
use crate::gate::{num_cores, to_python, without_gil};

/// Runs the plan and returns what it did: `bytes_read`, `bytes_written`, `tensors`.
#[pyfunction]
#[pyo3(signature = (plan_json, *, threads=None, memory_budget_bytes=134_217_728, progress=None, device=None))]
pub fn run_plan<'py>(
    py: Python<'py>,
    plan_json: &str,
    threads: Option<usize>,
    memory_budget_bytes: usize,
    progress: Option<Py<PyAny>>,
    device: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let device = device.map(PythonDevice::new);
    let (cpu, limits) = checked("run_plan", threads, memory_budget_bytes)?;
    let limits = Limits { device: device.as_ref().map(|device| device as &dyn Device), ..limits };
    let mut raised = None;
    let outcome = without_gil(py, || {
        let job = Job::new(Plan::from_json(plan_json)?)?;
        run(&job, cpu, limits, &mut |now| watch(now, progress.as_ref(), &mut raised))
    })?;
    if let Some(error) = raised.or_else(|| device.as_ref().and_then(PythonDevice::take_raised)) {
        return Err(error);
    }
    match outcome.map_err(|error| to_python(py, &error))? {
        Outcome::Done { bytes_read, bytes_written, num_tensors } => {
            let report = PyDict::new(py);
            report.set_item("bytes_read", bytes_read)?;
            report.set_item("bytes_written", bytes_written)?;
            report.set_item("tensors", num_tensors)?;
            Ok(report)
        }
        Outcome::Stopped => Err(to_python(py, &Error::Plan("run_plan: stopped without a reason".to_owned()))),
    }
}

/// Returns the scales (f32, little-endian) of the one tensor that the plan quantizes; writes nothing.
#[pyfunction]
#[pyo3(signature = (plan_json, *, threads=None, memory_budget_bytes=134_217_728, progress=None))]
pub fn block_maxima<'py>(
    py: Python<'py>,
    plan_json: &str,
    threads: Option<usize>,
    memory_budget_bytes: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyBytes>> {
    let (cpu, limits) = checked("block_maxima", threads, memory_budget_bytes)?;
    let mut raised = None;
    let found = without_gil(py, || {
        let job = Job::new(Plan::from_json(plan_json)?)?;
        let found = scales(&job, cpu, limits, &mut |now| watch(now, progress.as_ref(), &mut raised))?;
        Ok(found.map(|scales| scales.iter().flat_map(|scale| scale.to_le_bytes()).collect::<Vec<_>>()))
    })?;
    if let Some(error) = raised {
        return Err(error);
    }
    match found.map_err(|error: Error| to_python(py, &error))? {
        Some(bytes) => Ok(PyBytes::new(py, &bytes)),
        None => Err(to_python(py, &Error::Plan("block_maxima: stopped without a reason".to_owned()))),
    }
}

/// The CPU of this process and what a run may use.
fn checked(what: &str, threads: Option<usize>, memory_budget_bytes: usize) -> PyResult<(Cpu, Limits<'static>)> {
    let cpu = Cpu::chosen().map_err(|error| PyValueError::new_err(error.to_string()))?;
    let num_threads = threads.unwrap_or_else(num_cores);
    if num_threads == 0 || memory_budget_bytes == 0 {
        return Err(PyValueError::new_err(format!("{what}: threads and memory_budget_bytes must be at least 1")));
    }
    Ok((cpu, Limits { num_threads, memory_budget_bytes, device: None }))
}

/// Lets Python handle its signals (Ctrl-C) and tells it how far the run is; what it raises stops the run.
fn watch(now: Progress, progress: Option<&Py<PyAny>>, raised: &mut Option<PyErr>) -> ControlFlow<()> {
    if raised.is_some() {
        return ControlFlow::Break(());
    }
    let told = Python::attach(|py| {
        py.check_signals()?;
        match progress {
            Some(callback) => callback.call1(py, (now.done_bytes, now.total_bytes)).map(drop),
            None => Ok(()),
        }
    });
    match told {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => {
            *raised = Some(error);
            ControlFlow::Break(())
        }
    }
}
