//! 4-bit quantization for Python.

use fastft_kernels::nf4::{Blocks, Code, nested};
use fastft_kernels::{Element, merge, parallel};
use pyo3::prelude::*;

use crate::borrow::Loans;
use crate::gate::{array_error, without_gil, workers};

/// The element with this name.
pub fn element(py: Python, what: &str, name: &str) -> PyResult<Element> {
    match name {
        "float32" => Ok(Element::F32),
        "float16" => Ok(Element::F16),
        "bfloat16" => Ok(Element::Bf16),
        _ => Err(array_error(py, &format!("{what}: dtype {name} is not allowed; use float32, float16 or bfloat16"))),
    }
}

fn code(py: Python, name: &str) -> PyResult<Code> {
    let found = Code::ALL.into_iter().find(|code| code.name() == name);
    found.ok_or_else(|| array_error(py, &format!("quant_type {name:?} is not allowed; use nf4 or fp4")))
}

fn blocks(py: Python, quant_type: &str, blocksize: usize) -> PyResult<Blocks> {
    Blocks::new(code(py, quant_type)?, blocksize).map_err(|error| array_error(py, &error.to_string()))
}

/// Quantizes an array; whether every scale is finite.
#[pyfunction]
#[pyo3(signature = (source, dtype, packed, absmax, *, quant_type, blocksize, threads=None))]
#[expect(clippy::too_many_arguments, reason = "an array, two results, and how")]
pub fn quantize_4bit(
    py: Python,
    source: &Bound<PyAny>,
    dtype: &str,
    packed: &Bound<PyAny>,
    absmax: &Bound<PyAny>,
    quant_type: &str,
    blocksize: usize,
    threads: Option<usize>,
) -> PyResult<bool> {
    let blocks = blocks(py, quant_type, blocksize)?;
    let from = element(py, "quantize_4bit", dtype)?;
    let (cpu, threads) = workers(py, "quantize_4bit", threads)?;
    let loans = Loans::default();
    let packed = loans.exclusive::<u8>(packed, "quantize_4bit: out")?;
    let absmax = loans.exclusive::<f32>(absmax, "quantize_4bit: absmax")?;
    let source = loans.shared::<u8>(source, "quantize_4bit: x")?;
    let done = without_gil(py, || {
        parallel::quantize_4bit(cpu, blocks, from, source, packed, absmax, threads)?;
        Ok::<_, fastft_kernels::nf4::Error>(merge::all_finite(absmax))
    })?;
    done.map_err(|error| array_error(py, &error.to_string()))
}

/// The way back.
#[pyfunction]
#[pyo3(signature = (packed, absmax, target, dtype, *, quant_type, blocksize, threads=None))]
#[expect(clippy::too_many_arguments, reason = "two arrays, a result, and how")]
pub fn dequantize_4bit(
    py: Python,
    packed: &Bound<PyAny>,
    absmax: &Bound<PyAny>,
    target: &Bound<PyAny>,
    dtype: &str,
    quant_type: &str,
    blocksize: usize,
    threads: Option<usize>,
) -> PyResult<()> {
    let blocks = blocks(py, quant_type, blocksize)?;
    let to = element(py, "dequantize_4bit", dtype)?;
    let (cpu, threads) = workers(py, "dequantize_4bit", threads)?;
    let loans = Loans::default();
    let target = loans.exclusive::<u8>(target, "dequantize_4bit: out")?;
    let packed = loans.shared::<u8>(packed, "dequantize_4bit: packed")?;
    let absmax = loans.shared::<f32>(absmax, "dequantize_4bit: absmax")?;
    let done = without_gil(py, || parallel::dequantize_4bit(cpu, blocks, packed, absmax, to, target, threads))?;
    done.map_err(|error| array_error(py, &error.to_string()))
}

/// Quantizes scales to 8 bit around `offset`.
#[pyfunction]
#[pyo3(signature = (absmax, offset, codes, nested_absmax, *, threads=None))]
pub fn quantize_scales(
    py: Python,
    absmax: &Bound<PyAny>,
    offset: f32,
    codes: &Bound<PyAny>,
    nested_absmax: &Bound<PyAny>,
    threads: Option<usize>,
) -> PyResult<()> {
    let (_, threads) = workers(py, "quantize_scales", threads)?;
    let loans = Loans::default();
    let codes = loans.exclusive::<u8>(codes, "quantize_scales: codes")?;
    let nested_absmax = loans.exclusive::<f32>(nested_absmax, "quantize_scales: nested_absmax")?;
    let absmax = loans.shared::<f32>(absmax, "quantize_scales: absmax")?;
    let done = without_gil(py, || parallel::quantize_scales(absmax, offset, codes, nested_absmax, threads))?;
    done.map_err(|error| array_error(py, &error.to_string()))
}

/// The way back.
#[pyfunction]
#[pyo3(signature = (codes, nested_absmax, offset, absmax, *, threads=None))]
pub fn dequantize_scales(
    py: Python,
    codes: &Bound<PyAny>,
    nested_absmax: &Bound<PyAny>,
    offset: f32,
    absmax: &Bound<PyAny>,
    threads: Option<usize>,
) -> PyResult<()> {
    let (_, threads) = workers(py, "dequantize_scales", threads)?;
    let loans = Loans::default();
    let absmax = loans.exclusive::<f32>(absmax, "dequantize_scales: absmax")?;
    let codes = loans.shared::<u8>(codes, "dequantize_scales: codes")?;
    let nested_absmax = loans.shared::<f32>(nested_absmax, "dequantize_scales: nested_absmax")?;
    let done = without_gil(py, || parallel::dequantize_scales(codes, nested_absmax, offset, absmax, threads))?;
    done.map_err(|error| array_error(py, &error.to_string()))
}

/// The 16 values of a code book, by code.
#[pyfunction]
pub fn code_book(py: Python, quant_type: &str) -> PyResult<[f32; 16]> {
    Ok(code(py, quant_type)?.book())
}

/// The 256 values that scales are quantized to, ascending.
#[pyfunction]
pub fn nested_map() -> Vec<f32> {
    nested::MAP.to_vec()
}
