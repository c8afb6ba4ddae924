//! Python's memory as slices, for the length of one call and without a copy. The only `unsafe` of the border.
//!
//! What Python hands over is memory that it may also write to. [`Loans`] makes it safe as far as Rust can see: the
//! buffer protocol keeps the memory alive and in its place, only contiguous and aligned buffers of numbers are taken,
//! and a buffer that is written to may share no byte with another loan of the same call. What Rust cannot see is
//! another thread of Python that writes into an array while a call works on it; the docs of `fastft.native` forbid it,
//! as numpy's and torch's own do. Every kernel takes any bits for any values, so such a write gives wrong numbers.

#![expect(unsafe_code, reason = "the buffer protocol gives a pointer; no safe call makes a slice of it")]

use std::cell::RefCell;
use std::ops::Range;

use pyo3::buffer::{Element, PyBuffer};
use pyo3::prelude::*;

use crate::gate::array_error;

/// A number of which every pattern of bits is a value.
pub trait Plain: Element + Send + 'static {}

impl Plain for u8 {}
impl Plain for f32 {}

/// The buffers of one call. Slices live no longer than it.
#[derive(Default)]
pub struct Loans {
    held: RefCell<Vec<Loan>>,
}

struct Loan {
    /// Keeps the memory alive and in its place.
    _buffer: Box<dyn Send>,
    what: String,
    places: Range<usize>,
    is_exclusive: bool,
}

impl Loans {
    /// The memory of `array`, to be read.
    pub fn shared<T: Plain>(&self, array: &Bound<PyAny>, what: &str) -> PyResult<&[T]> {
        let (start, length) = self.lend::<T>(array, what, false)?;
        if length == 0 {
            return Ok(&[]);
        }
        // SAFETY: `lend` found `length` contiguous, aligned values of T at `start`; every pattern of bits is a T. The
        // buffer that `self` holds keeps them there as long as the slice lives, and no exclusive loan covers them.
        Ok(unsafe { std::slice::from_raw_parts(start, length) })
    }

    /// The memory of `array`, to be written to.
    #[expect(clippy::mut_from_ref, reason = "each call gives memory of its own, which `lend` makes sure of")]
    pub fn exclusive<T: Plain>(&self, array: &Bound<PyAny>, what: &str) -> PyResult<&mut [T]> {
        let (start, length) = self.lend::<T>(array, what, true)?;
        if length == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as for `shared`; the buffer is writable and shares no byte with any other loan.
        Ok(unsafe { std::slice::from_raw_parts_mut(start, length) })
    }

    /// Takes a buffer in after all checks: its first value and their number.
    fn lend<T: Plain>(&self, array: &Bound<PyAny>, what: &str, is_exclusive: bool) -> PyResult<(*mut T, usize)> {
        let py = array.py();
        let buffer = PyBuffer::<T>::get(array)?;
        if is_exclusive && buffer.readonly() {
            return Err(array_error(py, &format!("{what}: the array is read-only")));
        }
        let Some(values) = buffer.as_slice_ptr() else {
            return Err(array_error(py, &format!("{what}: the array is not contiguous")));
        };
        let (start, length) = (values.cast::<T>().as_ptr(), values.len());
        let places = start.addr()..start.addr() + length * size_of::<T>();
        let mut held = self.held.borrow_mut();
        let conflict = held.iter().find(|other| {
            (is_exclusive || other.is_exclusive)
                && places.start.max(other.places.start) < places.end.min(other.places.end)
        });
        if let Some(other) = conflict {
            return Err(array_error(py, &format!("{what}: shares memory with {}", other.what)));
        }
        held.push(Loan { _buffer: Box::new(buffer), what: what.to_owned(), places, is_exclusive });
        Ok((start, length))
    }
}
