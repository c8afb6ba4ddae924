//! Byte-level tokens for Python: `fastft.data.byte_level` answers for what the tokenizer itself must say.

use std::sync::{Mutex, PoisonError};

use fastft_tokens::{Added, Pattern, Scan, Shape, Tokenizer, Words};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyBytes;

use crate::gate::without_gil;

/// Bytes of a token's shape: three u16.
const SHAPE_BYTES: usize = 6;

/// A tokenizer that remembers the tokens of pieces.
#[pyclass(frozen, module = "fastft._native")]
pub struct ByteLevel {
    tokenizer: Mutex<Tokenizer>,
}

/// What a look at some texts found.
#[pyclass(frozen, module = "fastft._native")]
pub struct ByteLevelScan {
    scan: Scan,
}

fn wrong(text: String) -> PyErr {
    PyValueError::new_err(text)
}

fn read_shapes(shapes: &[u8]) -> PyResult<Vec<Shape>> {
    let (shapes, rest) = shapes.as_chunks::<SHAPE_BYTES>();
    if !rest.is_empty() {
        return Err(wrong(format!("shapes of {SHAPE_BYTES} bytes each, and {} bytes more", rest.len())));
    }
    let shapes = shapes.iter().map(|&[a, b, c, d, e, f]| Shape {
        bytes: u16::from_le_bytes([a, b]),
        lead: u16::from_le_bytes([c, d]),
        trail: u16::from_le_bytes([e, f]),
    });
    Ok(shapes.collect())
}

#[pymethods]
impl ByteLevel {
    #[new]
    fn new(pattern: &str, first: Vec<(String, u32)>, then: Vec<(String, u32)>, shapes: &[u8]) -> PyResult<Self> {
        let pattern = match pattern {
            "gpt2" => Pattern::Gpt2,
            "qwen2" => Pattern::Qwen2,
            "llama3" => Pattern::Llama3,
            other => return Err(wrong(format!("pattern {other}; there are gpt2, qwen2, llama3"))),
        };
        let tokenizer = Tokenizer::new(pattern, Added::new(first), Added::new(then), read_shapes(shapes)?);
        Ok(Self { tokenizer: Mutex::new(tokenizer) })
    }

    #[staticmethod]
    fn of_words(joiners: &str, prepends: bool, added: Vec<(String, u32)>, shapes: &[u8]) -> PyResult<Self> {
        let words = Words { joiners: joiners.chars().collect(), prepends };
        let tokenizer = Tokenizer::of_words(words, Added::new(added), read_shapes(shapes)?);
        Ok(Self { tokenizer: Mutex::new(tokenizer) })
    }

    fn learn_block(&self, block: usize, classes: &[u8]) -> PyResult<()> {
        let mut tokenizer = self.tokenizer.lock().unwrap_or_else(PoisonError::into_inner);
        tokenizer.learn_block(block, classes).map_err(wrong)
    }

    fn scan(
        &self,
        py: Python,
        texts: Vec<PyBackedStr>,
        spans: Vec<Vec<(usize, usize)>>,
        threads: usize,
    ) -> PyResult<ByteLevelScan> {
        let scan = without_gil(py, || {
            let tokenizer = self.tokenizer.lock().unwrap_or_else(PoisonError::into_inner);
            let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();
            tokenizer.scan(&texts, &spans, threads)
        })?;
        Ok(ByteLevelScan { scan: scan.map_err(wrong)? })
    }

    fn finish<'py>(
        &self,
        py: Python<'py>,
        scan: PyRef<'py, ByteLevelScan>,
        answers: Vec<Vec<u32>>,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let scan = &scan.scan;
        let encoded = without_gil(py, || {
            let mut tokenizer = self.tokenizer.lock().unwrap_or_else(PoisonError::into_inner);
            tokenizer.finish(scan, &answers).map(|encoded| {
                let ids: Vec<u8> = encoded.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
                let lengths: Vec<u8> = encoded.lengths.iter().flat_map(|length| length.to_le_bytes()).collect();
                (ids, encoded.learned, lengths)
            })
        })?;
        let (ids, learned, lengths) = encoded.map_err(wrong)?;
        Ok((PyBytes::new(py, &ids), PyBytes::new(py, &learned), PyBytes::new(py, &lengths)))
    }
}

#[pymethods]
impl ByteLevelScan {
    #[getter]
    fn blocks(&self) -> Vec<usize> {
        self.scan.blocks.iter().copied().collect()
    }

    #[getter]
    fn refused(&self) -> Vec<usize> {
        self.scan.refused.clone()
    }

    #[getter]
    fn asked<'py>(&self, py: Python<'py>) -> Vec<Bound<'py, PyBytes>> {
        self.scan.asked.iter().map(|piece| PyBytes::new(py, piece)).collect()
    }
}
