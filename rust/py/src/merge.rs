//! Low-rank merges and casts of arrays for Python.

use fastft_kernels::merge::{Band, Base, Delta, Left, Panels};
use fastft_kernels::parallel::{self, Magnitude};
use fastft_kernels::{Cpu, Element, cast as kernel, merge};
use pyo3::prelude::*;

use crate::borrow::Loans;
use crate::gate::{array_error, without_gil, workers};
use crate::nf4::element;

/// `target = round(f32(base) + scale * (b @ a))`; whether every finite weight stayed finite.
///
/// Without `base` the target is its own. A transposed merge adds the transpose of the product. With `magnitude` each
/// row (a transposed weight's column) is scaled to it.
#[pyfunction]
#[pyo3(signature = (base, base_dtype, target, dtype, shape, a, a_dtype, b, b_dtype, rank, scale, *, magnitude=None, transposed, threads=None))]
#[expect(clippy::too_many_arguments, reason = "four arrays with their dtypes, and how")]
pub fn merge_low_rank(
    py: Python,
    base: Option<&Bound<PyAny>>,
    base_dtype: &str,
    target: &Bound<PyAny>,
    dtype: &str,
    shape: (usize, usize),
    a: &Bound<PyAny>,
    a_dtype: &str,
    b: &Bound<PyAny>,
    b_dtype: &str,
    rank: usize,
    scale: f32,
    magnitude: Option<&Bound<PyAny>>,
    transposed: bool,
    threads: Option<usize>,
) -> PyResult<bool> {
    const WHAT: &str = "merge_lora";
    let (from, to) = (element(py, WHAT, base_dtype)?, element(py, WHAT, dtype)?);
    let (a_element, b_element) = (element(py, WHAT, a_dtype)?, element(py, WHAT, b_dtype)?);
    let (cpu, threads) = workers(py, WHAT, threads)?;
    let loans = Loans::default();
    let target = loans.exclusive::<u8>(target, "merge_lora: out")?;
    let base = base.map(|base| loans.shared::<u8>(base, "merge_lora: W")).transpose()?;
    let a = loans.shared::<u8>(a, "merge_lora: A")?;
    let b = loans.shared::<u8>(b, "merge_lora: B")?;
    let magnitude = magnitude.map(|array| loans.shared::<f32>(array, "merge_lora: magnitude")).transpose()?;
    let band = Band { rows: shape.0, columns: shape.1 };
    let done = without_gil(py, || {
        let (a, b) = (widened(cpu, a_element, a)?, widened(cpu, b_element, b)?);
        if !(merge::all_finite(&a) && merge::all_finite(&b)) {
            return Ok(None);
        }
        // The transposed product is the product of the transposed factors.
        let (left, strides, right) = if transposed {
            (&a, (1, band.rows), Panels::from_columns(rank, band.columns, &b)?)
        } else {
            (&b, (rank, 1), Panels::from_rows(rank, band.columns, &a)?)
        };
        let left = Left { values: left, row_stride: strides.0, rank_stride: strides.1 };
        let delta = Delta { left, right: &right, scale };
        let base = base.map_or(Base::InPlace, |base| Base::Apart(from, base));
        let kept = match magnitude {
            None => parallel::merge(cpu, band, base, to, target, delta, threads),
            Some(magnitude) => {
                let magnitude = if transposed { Magnitude::OfColumns(magnitude) } else { Magnitude::OfRows(magnitude) };
                parallel::merge_dora(cpu, band, base, to, target, delta, magnitude, threads)
            }
        };
        kept.map(Some)
    })?;
    let kept = done.map_err(|error: kernel::LengthError| array_error(py, &error.to_string()))?;
    kept.ok_or_else(|| array_error(py, "merge_lora: A or B holds a value that is not finite"))
}

fn widened(cpu: Cpu, from: Element, source: &[u8]) -> Result<Vec<f32>, kernel::LengthError> {
    let mut values = vec![0.0; source.len() / from.size_bytes()];
    kernel::widen(cpu, from, source, &mut values)?;
    Ok(values)
}

/// Rounds values to another dtype; whether every finite value stayed finite.
#[pyfunction]
pub fn cast(
    py: Python,
    source: &Bound<PyAny>,
    source_dtype: &str,
    target: &Bound<PyAny>,
    dtype: &str,
) -> PyResult<bool> {
    let (from, to) = (element(py, "cast", source_dtype)?, element(py, "cast", dtype)?);
    let (cpu, _) = workers(py, "cast", Some(1))?;
    let loans = Loans::default();
    let target = loans.exclusive::<u8>(target, "cast: target")?;
    let source = loans.shared::<u8>(source, "cast: source")?;
    let done = without_gil(py, || kernel::cast(cpu, from, source, to, target))?;
    done.map_err(|error| array_error(py, &error.to_string()))
}
