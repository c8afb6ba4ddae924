//! The one way in for work that takes longer than a moment: without the GIL, with errors and panics translated.

use std::any::Any;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fastft_checkpoint::Error;
use fastft_kernels::Cpu;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

/// Runs `work` without the GIL. A panic, which is a bug of ours, becomes a `RuntimeError` that says so.
pub fn without_gil<T: Send>(py: Python, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    py.detach(|| catch_unwind(AssertUnwindSafe(work))).map_err(|payload| bug(payload.as_ref()))
}

fn bug(payload: &(dyn Any + Send)) -> PyErr {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no text");
    PyRuntimeError::new_err(format!("this is a bug in fastft, please report it: {text}"))
}

/// The class of `fastft.errors` for a failure, with its text.
pub fn to_python(py: Python, error: &Error) -> PyErr {
    let class = match error {
        Error::Checkpoint(_) => "CheckpointError",
        Error::File(_) | Error::System(..) => "FileError",
        Error::Plan(_) => "PlanError",
    };
    let made = raised(py, class, &error.to_string());
    if let Error::System(_, number) = error
        && let Err(failure) = made.value(py).setattr("errno", number)
    {
        return failure;
    }
    made
}

/// `ArrayError` with `text`.
pub fn array_error(py: Python, text: &str) -> PyErr {
    raised(py, "ArrayError", text)
}

fn raised(py: Python, class: &str, text: &str) -> PyErr {
    let raised = py.import("fastft.errors").and_then(|errors| errors.getattr(class)?.call1((text,)));
    raised.map_or_else(|failure| failure, PyErr::from_value)
}

/// The CPU and the number of threads of a call; all cores where none is given.
pub fn workers(py: Python, what: &str, threads: Option<usize>) -> PyResult<(Cpu, usize)> {
    let cpu = Cpu::chosen().map_err(|error| PyValueError::new_err(error.to_string()))?;
    match threads.unwrap_or_else(num_cores) {
        0 => Err(array_error(py, &format!("{what}: threads must be at least 1"))),
        threads => Ok((cpu, threads)),
    }
}

/// The number of cores that this process may use.
pub fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}
