//! The fused low-rank merge: `W' = round(f32(W) + sum over deltas of scale * (L R))`, one band of rows at a time.
//!
//! Letters: W is a band of rows x columns; a delta is a left factor L (rows x rank) times a right factor R (rank x
//! columns). For a Linear layer L is rows of `lora_B` and R is `lora_A`; for a transposed layer (`Conv1D`) L is the transpose
//! of `lora_A` and R that of `lora_B`. Each product is summed over the rank in order with fused multiply-add, then
//! multiplied by the scale; the products of several deltas are added in order; then W is added and the sum is rounded
//! once. A base value that is not finite is passed on as it is.
//!
//! # Source
//! PEFT 0.21, `tuners/lora/layer.py`, `get_delta_weight` and `merge`, for the order of the operations.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod f16c;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", test))]
mod lanes;
#[cfg(any(target_arch = "aarch64", test))]
mod neon;
mod scalar;

use crate::cast::{LengthError, check_length, narrow_unchecked, widen_unchecked};
use crate::element::{Element, is_finite};
use crate::level::Cpu;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", test))]
use crate::level::Level;

/// Columns of one panel of a right factor: two AVX-512 or four AVX2 registers.
const PANEL: usize = 32;

/// Rows that are multiplied together.
const ROWS: usize = 6;

/// Most columns that are multiplied together: their sums stay in the first-level cache.
const MOST_COLUMNS: usize = 512;

/// f32 values of a right factor that stay in the second-level cache while all rows of a band pass by.
const BLOCK_VALUES: usize = 32 * 1024;

/// A right factor R (rank x columns), laid out for the kernel: panels of 32 columns, each with its rank rows in
/// order, the last one filled up with zeros.
#[derive(Clone, Debug)]
pub struct Panels {
    rank: usize,
    columns: usize,
    values: Vec<f32>,
}

impl Panels {
    /// From R as it is: row-major (rank, columns).
    ///
    /// # Errors
    /// The length is not rank x columns, or one of them is zero.
    pub fn from_rows(rank: usize, columns: usize, right: &[f32]) -> Result<Self, LengthError> {
        let mut panels = Self::zeros(rank, columns, right)?;
        for (panel, block) in panels.values.chunks_exact_mut(rank * PANEL).enumerate() {
            let first = panel * PANEL;
            let width = PANEL.min(columns - first);
            for (row, values) in block.chunks_exact_mut(PANEL).enumerate() {
                values[..width].copy_from_slice(&right[row * columns + first..][..width]);
            }
        }
        Ok(panels)
    }

    /// From the transpose of R: row-major (columns, rank).
    ///
    /// # Errors
    /// The length is not rank x columns, or one of them is zero.
    pub fn from_columns(rank: usize, columns: usize, transposed: &[f32]) -> Result<Self, LengthError> {
        let mut panels = Self::zeros(rank, columns, transposed)?;
        for (column, values) in transposed.chunks_exact(rank).enumerate() {
            let panel = &mut panels.values[column / PANEL * rank * PANEL..];
            for (row, value) in values.iter().enumerate() {
                panel[row * PANEL + column % PANEL] = *value;
            }
        }
        Ok(panels)
    }

    fn zeros(rank: usize, columns: usize, right: &[f32]) -> Result<Self, LengthError> {
        let expected = rank.checked_mul(columns).filter(|values| *values > 0);
        check_length("panels: right factor", right.len(), expected)?;
        let size = columns.div_ceil(PANEL).checked_mul(PANEL).and_then(|padded| padded.checked_mul(rank));
        let size = size.ok_or(LengthError { what: "panels: right factor", got: right.len(), expected: usize::MAX })?;
        Ok(Self { rank, columns, values: vec![0.0; size] })
    }

    /// Size in memory.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.values.len() * size_of::<f32>()
    }

    /// The panels that hold `columns` columns from `first`, a multiple of [`PANEL`].
    fn block(&self, first: usize, columns: usize) -> &[f32] {
        let panel_size = self.rank * PANEL;
        &self.values[first / PANEL * panel_size..(first + columns).div_ceil(PANEL) * panel_size]
    }
}

/// A left factor L: the value of row `i` and rank index `k` stands at `i * row_stride + k * rank_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Left<'a> {
    /// The values, from the first row of the band on.
    pub values: &'a [f32],
    /// Distance of neighbouring rows.
    pub row_stride: usize,
    /// Distance of neighbouring rank indices.
    pub rank_stride: usize,
}

/// One low-rank product that is added to a band.
#[derive(Clone, Copy, Debug)]
pub struct Delta<'a> {
    /// The left factor, (rows, rank).
    pub left: Left<'a>,
    /// The right factor, (rank, columns).
    pub right: &'a Panels,
    /// What the product is multiplied by.
    pub scale: f32,
}

/// Where the base weights of a band are.
#[derive(Clone, Copy, Debug)]
pub enum Base<'a> {
    /// In the target itself, in the target's element; they are overwritten.
    InPlace,
    /// Elsewhere, in an element of their own.
    Apart(Element, &'a [u8]),
}

/// The shape of a band of the weight: row-major, whole rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
}

/// How often a merged value is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Once: base and products are summed in f32.
    Once,
    /// The sum of the products is rounded to the target's element, then the sum with the base again. Less exact; PEFT
    /// 0.21 does it for embeddings and expert parameters.
    DeltaFirst,
}

/// Whether every value is finite.
#[must_use]
pub fn all_finite(values: &[f32]) -> bool {
    values.iter().fold(true, |finite, value| finite & is_finite(value.to_bits()))
}

/// Merges `deltas` onto a band of weights and writes it to `target` as values of `to`. Returns whether every finite
/// base value stayed finite. Without deltas the band is cast, and a band in place is left as it is.
///
/// # Errors
/// The sizes of the band, the target, the base or a factor do not agree.
pub fn merge(
    cpu: Cpu,
    band: Band,
    base: Base,
    to: Element,
    target: &mut [u8],
    deltas: &[Delta],
    rounding: Rounding,
) -> Result<bool, LengthError> {
    check(band, base, to, target, deltas)?;
    if deltas.is_empty() {
        return match base {
            Base::InPlace => Ok(true),
            Base::Apart(from, source) => crate::cast::cast(cpu, from, source, to, target),
        };
    }
    let num_ranks: usize = deltas.iter().map(|delta| delta.right.rank).sum();
    let block = (BLOCK_VALUES / num_ranks / PANEL * PANEL).max(2 * PANEL);
    let mut work = Work {
        cpu,
        band,
        deltas,
        left: vec![0.0; ROWS * num_ranks],
        base: [0.0; MOST_COLUMNS],
        sums: vec![0.0; ROWS * MOST_COLUMNS],
        rounding,
        kept: true,
    };
    for block_start in (0..band.columns).step_by(block) {
        let block_end = band.columns.min(block_start + block);
        for row in (0..band.rows).step_by(ROWS) {
            let rows = ROWS.min(band.rows - row);
            work.pack_left(row, rows);
            for column in (block_start..block_end).step_by(MOST_COLUMNS) {
                let columns = MOST_COLUMNS.min(block_end - column);
                work.multiply(rows, column, columns);
                work.add(row, rows, column, columns, base, to, target);
            }
        }
    }
    Ok(work.kept)
}

/// Refuses sizes that do not agree.
pub(crate) fn check(band: Band, base: Base, to: Element, target: &[u8], deltas: &[Delta]) -> Result<(), LengthError> {
    let values = band.rows.checked_mul(band.columns);
    let bytes_of = |element: Element| values.and_then(|values| values.checked_mul(element.size_bytes()));
    check_length("merge: target", target.len(), bytes_of(to))?;
    if let Base::Apart(from, source) = base {
        check_length("merge: base", source.len(), bytes_of(from))?;
    }
    for delta in deltas {
        check_length("merge: columns of a right factor", delta.right.columns, Some(band.columns))?;
        if band.rows == 0 {
            continue;
        }
        let last_row = (band.rows - 1).checked_mul(delta.left.row_stride);
        let last_rank = (delta.right.rank - 1).checked_mul(delta.left.rank_stride);
        let needed = last_row.zip(last_rank).and_then(|(row, rank)| row.checked_add(rank)?.checked_add(1));
        if needed.is_none_or(|needed| delta.left.values.len() < needed) {
            check_length("merge: left factor", delta.left.values.len(), needed)?;
        }
    }
    Ok(())
}

/// A merge on its way: some rows and columns at a time.
struct Work<'a> {
    cpu: Cpu,
    band: Band,
    deltas: &'a [Delta<'a>],
    /// The rows of each delta's left factor, laid out by rank index: (rank, rows), one delta after the other.
    left: Vec<f32>,
    base: [f32; MOST_COLUMNS],
    /// The sum of the products: [`ROWS`] rows of [`MOST_COLUMNS`] values.
    sums: Vec<f32>,
    rounding: Rounding,
    kept: bool,
}

impl Work<'_> {
    fn pack_left(&mut self, row: usize, rows: usize) {
        let mut start = 0;
        for delta in self.deltas {
            let Left { values, row_stride, rank_stride } = delta.left;
            for (k, packed) in self.left[start..].chunks_exact_mut(rows).take(delta.right.rank).enumerate() {
                for (group_row, place) in packed.iter_mut().enumerate() {
                    *place = values[(row + group_row) * row_stride + k * rank_stride];
                }
            }
            start += rows * delta.right.rank;
        }
    }

    fn multiply(&mut self, rows: usize, column: usize, columns: usize) {
        let mut start = 0;
        for (index, delta) in self.deltas.iter().enumerate() {
            let part = Product { rank: delta.right.rank, rows, scale: delta.scale, add: index > 0 };
            let left = &self.left[start..start + rows * part.rank];
            product(self.cpu, part, left, delta.right.block(column, columns), &mut self.sums);
            start += rows * part.rank;
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a place in a band, and the band's two buffers")]
    fn add(
        &mut self,
        row: usize,
        rows: usize,
        column: usize,
        columns: usize,
        base: Base,
        to: Element,
        target: &mut [u8],
    ) {
        for group_row in 0..rows {
            let first = (row + group_row) * self.band.columns + column;
            let base_values = &mut self.base[..columns];
            let sums = &mut self.sums[group_row * MOST_COLUMNS..][..columns];
            if self.rounding == Rounding::DeltaFirst {
                let mut rounded = [0; MOST_COLUMNS * 4];
                let rounded = &mut rounded[..columns * to.size_bytes()];
                self.kept &= narrow_unchecked(self.cpu, sums, to, rounded);
                widen_unchecked(self.cpu, to, rounded, sums);
            }
            let bytes = &mut target[first * to.size_bytes()..][..columns * to.size_bytes()];
            match base {
                Base::InPlace => widen_unchecked(self.cpu, to, bytes, base_values),
                Base::Apart(from, source) => {
                    let source = &source[first * from.size_bytes()..][..columns * from.size_bytes()];
                    widen_unchecked(self.cpu, from, source, base_values);
                }
            }
            self.kept &= add(self.cpu, base_values, sums, to, bytes);
        }
    }
}

/// What one call of a product variant does.
#[derive(Clone, Copy)]
struct Product {
    rank: usize,
    /// 1 to [`ROWS`].
    rows: usize,
    scale: f32,
    /// Whether the product is added to the sums or replaces them.
    add: bool,
}

/// Puts the product of `left` (rank, rows) and `panels` into `sums`: rows of [`MOST_COLUMNS`] values.
fn product(cpu: Cpu, part: Product, left: &[f32], panels: &[f32], sums: &mut [f32]) {
    match cpu.level() {
        // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::product(part, left, panels, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::product(part, left, panels, sums) },
        #[cfg(any(target_arch = "aarch64", test))]
        Level::Neon => neon::product(part, left, panels, sums),
        _ => scalar::product(part, left, panels, sums),
    }
}

/// Adds base and sums, rounds once, and says whether every finite base value stayed finite.
fn add(cpu: Cpu, base: &[f32], sums: &[f32], to: Element, target: &mut [u8]) -> bool {
    match cpu.level() {
        // SAFETY: a `Cpu` exists only for a level that this CPU was found to have.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::add(base, sums, to, target) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::add(base, sums, to, target) },
        #[cfg(any(target_arch = "aarch64", test))]
        Level::Neon => neon::add(base, sums, to, target),
        _ => scalar::add(base, sums, to, target),
    }
}
