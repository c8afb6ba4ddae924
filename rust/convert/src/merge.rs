//! A weight with low-rank products: which rows get which product, and the factors in the kernel's layout.

use std::sync::{Arc, Mutex, PoisonError};

use fastft_checkpoint::{Error, Result};
use fastft_kernels::merge::{self as kernel, Band, Base, Left, Panels, Rounding};
use fastft_kernels::{Element, cast};

use crate::content::Content;
use crate::job::{Check, Place};
use crate::plan::{Delta, Source};
use crate::tile::{Buffers, Reader};

/// A checked merge.
#[derive(Debug)]
pub struct Merge {
    base: Content,
    from: Element,
    to: Element,
    num_rows: usize,
    columns: usize,
    products: Vec<Product>,
    rounding: Rounding,
    /// The right factors while tiles of the tensor are worked on.
    prepared: Mutex<Option<Arc<Vec<Prepared>>>>,
}

/// One low-rank product, as left factor (rows x rank) times right factor (rank x columns).
#[derive(Debug)]
struct Product {
    left: Factor,
    right: Factor,
    rank: usize,
    scale: f32,
    /// Whether the factors are those of the transposed product: left is (rank, rows), right is (columns, rank).
    transposed: bool,
    /// (row of the weight, row of the product, number of rows)
    spans: Vec<(usize, usize, usize)>,
}

/// A factor in its file.
#[derive(Clone, Copy, Debug)]
struct Factor {
    place: Place,
    element: Element,
    num_values: usize,
    /// Of which columns of the rows in the file it is made; `None`: of all.
    columns: Option<Columns>,
}

/// Columns `first`, `first + step`, ... of rows of `width` values.
#[derive(Clone, Copy, Debug)]
struct Columns {
    first: usize,
    step: usize,
    width: usize,
}

/// What all tiles of a tensor share of a product.
#[derive(Debug)]
struct Prepared {
    right: Panels,
    /// The whole left factor where its rows do not lie together in the file (transposed), else nothing.
    left: Vec<f32>,
}

impl Merge {
    /// Checks the shapes of a merge.
    pub fn check(check: &Check, source: &Source, to: Element, deltas: &[Delta], round_delta: bool) -> Result<Self> {
        let base = Content::check(check, source)?;
        let from = check.element(source.dtype)?;
        let (num_rows, columns) = matrix(check, source)?;
        let mut products = Vec::with_capacity(deltas.len());
        for delta in deltas {
            products.push(Product::check(check, num_rows, columns, delta)?);
        }
        let rounding = if round_delta { Rounding::DeltaFirst } else { Rounding::Once };
        Ok(Self { base, from, to, num_rows, columns, products, rounding, prepared: Mutex::new(None) })
    }

    /// Rows of the weight.
    pub fn num_rows(&self) -> u64 {
        self.num_rows as u64
    }

    /// Makes rows `first..first + target / row size` of the merged weight.
    pub fn make(&self, reader: &Reader, first: usize, buffers: &mut Buffers) -> Result<()> {
        let prepared = self.prepared(reader)?;
        let Buffers { input, output, .. } = buffers;
        let row_bytes = self.columns * self.to.size_bytes();
        let num_rows = output.len() / row_bytes;
        let base_row_bytes = self.columns * self.from.size_bytes();
        let in_place = self.from == self.to;
        let (start, size) = (first * self.columns, self.from.size_bytes());
        if in_place {
            self.base.read(reader, start, size, output)?;
        } else {
            input.resize(num_rows * base_row_bytes, 0);
            self.base.read(reader, start, size, input)?;
        }
        for (start, end) in self.bands(first, first + num_rows) {
            let lefts = self.lefts(reader, &prepared, start, end)?;
            let deltas: Vec<_> = lefts.iter().map(|left| left.delta(&prepared)).collect();
            let base = if in_place {
                Base::InPlace
            } else {
                Base::Apart(self.from, &input[(start - first) * base_row_bytes..(end - first) * base_row_bytes])
            };
            let band = Band { rows: end - start, columns: self.columns };
            let target = &mut output[(start - first) * row_bytes..(end - first) * row_bytes];
            let kept = kernel::merge(reader.cpu, band, base, self.to, target, &deltas, self.rounding)
                .map_err(|error| reader.refuse(&error.to_string()))?;
            if !kept {
                return Err(reader.refuse(&format!(
                    "the merge makes an infinite or undefined value in rows {start} to {end} (dtype {:?}); merge into a wider dtype or with a smaller scale",
                    self.to
                )));
            }
        }
        Ok(())
    }

    /// Forgets the factors: no more tiles will come.
    pub fn finish(&self) {
        *self.prepared.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.base.finish();
    }

    fn prepared(&self, reader: &Reader) -> Result<Arc<Vec<Prepared>>> {
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(prepared) = prepared.as_ref() {
            return Ok(Arc::clone(prepared));
        }
        let products = self.products.iter().map(|product| product.prepare(reader, self.columns));
        let made = Arc::new(products.collect::<Result<Vec<_>>>()?);
        *prepared = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Cuts rows `start..end` where a product begins or ends.
    fn bands(&self, start: usize, end: usize) -> Vec<(usize, usize)> {
        let spans = self.products.iter().flat_map(|product| &product.spans);
        let edges = spans.flat_map(|(row, _, count)| [*row, row + count]);
        let mut cuts: Vec<_> = edges.filter(|edge| (start..end).contains(edge)).chain([start, end]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|pair| (pair[0], pair[1])).collect()
    }

    /// The left factors of the products that reach the band `start..end`.
    fn lefts(&self, reader: &Reader, prepared: &[Prepared], start: usize, end: usize) -> Result<Vec<LeftRows<'_>>> {
        let mut lefts = Vec::new();
        for (index, product) in self.products.iter().enumerate() {
            let span = product.spans.iter().find(|(row, _, count)| (*row..row + count).contains(&start));
            let Some((row, product_row, _)) = span else { continue };
            let first = product_row + start - row;
            let values = if prepared[index].left.is_empty() {
                product.left.read(reader, first * product.rank, (end - start) * product.rank)?
            } else {
                Vec::new()
            };
            lefts.push(LeftRows { product, index, first, values });
        }
        Ok(lefts)
    }
}

/// The left factor of a product, from row `first` on.
struct LeftRows<'a> {
    product: &'a Product,
    index: usize,
    first: usize,
    /// Rows read for this band, unless the whole factor is prepared.
    values: Vec<f32>,
}

impl LeftRows<'_> {
    fn delta<'a>(&'a self, prepared: &'a [Prepared]) -> kernel::Delta<'a> {
        let prepared = &prepared[self.index];
        let left = if self.product.transposed {
            let row_stride = 1;
            let rank_stride = self.product.left.num_values / self.product.rank;
            Left { values: &prepared.left[self.first..], row_stride, rank_stride }
        } else {
            Left { values: &self.values, row_stride: self.product.rank, rank_stride: 1 }
        };
        kernel::Delta { left, right: &prepared.right, scale: self.product.scale }
    }
}

impl Product {
    fn check(check: &Check, num_rows: usize, columns: usize, delta: &Delta) -> Result<Self> {
        let (rank, inputs) = matrix(check, &delta.a)?;
        let (outputs, b_width) = matrix(check, &delta.b)?;
        let chosen = delta.b_columns.map(|columns| check_columns(check, columns, b_width)).transpose()?;
        let b_rank = chosen.map_or(b_width, Columns::count);
        if rank == 0 || rank != b_rank {
            return check
                .refuse(&format!("lora_A {:?} and lora_B {:?} have no common rank", delta.a.shape, delta.b.shape));
        }
        #[expect(clippy::cast_possible_truncation, reason = "the scale is an f32 from here on (formats 2.1)")]
        let scale = delta.scale as f32;
        if !scale.is_finite() {
            return check.refuse(&format!("the scale {} is no finite number", delta.scale));
        }
        let a = Factor::check(check, &delta.a, None)?;
        let b = Factor::check(check, &delta.b, chosen)?;
        let (left, left_rows, right, right_columns) =
            if delta.transposed { (a, inputs, b, outputs) } else { (b, outputs, a, inputs) };
        let fits = right_columns == columns && (delta.rows.is_some() || left_rows == num_rows);
        if !fits {
            return check.refuse(&format!(
                "a product of lora_B {:?} and lora_A {:?} does not fit a weight of {num_rows} x {columns}",
                delta.b.shape, delta.a.shape
            ));
        }
        let spans = match &delta.rows {
            None => vec![(0, 0, num_rows)],
            Some(spans) => check_spans(check, spans, num_rows, left_rows)?,
        };
        Ok(Self { left, right, rank, scale, transposed: delta.transposed, spans })
    }

    fn prepare(&self, reader: &Reader, columns: usize) -> Result<Prepared> {
        let right = self.right.read(reader, 0, self.right.num_values)?;
        let panels = if self.transposed {
            Panels::from_columns(self.rank, columns, &right)
        } else {
            Panels::from_rows(self.rank, columns, &right)
        };
        let left = if self.transposed { self.left.read(reader, 0, self.left.num_values)? } else { Vec::new() };
        Ok(Prepared { right: panels.map_err(|error| reader.refuse(&error.to_string()))?, left })
    }
}

impl Factor {
    fn check(check: &Check, source: &Source, columns: Option<Columns>) -> Result<Self> {
        let (rows, width) = matrix(check, source)?;
        if source.packed.is_some() || source.seen.is_some() {
            return check.refuse("the factors of an adapter cannot be 4-bit numbers");
        }
        let num_values = rows * columns.map_or(width, Columns::count);
        Ok(Self { place: check.place(source)?, element: check.element(source.dtype)?, num_values, columns })
    }

    /// Values `first..first + count` as f32, all of them finite; whole rows where columns are chosen.
    fn read(&self, reader: &Reader, first: usize, count: usize) -> Result<Vec<f32>> {
        let Some(columns) = self.columns else {
            return self.read_values(reader, first, count);
        };
        let per_row = columns.count();
        let num_values = self.num_values / per_row * columns.width;
        let whole = reader.shared.get(self.place, || self.read_values(reader, 0, num_values))?;
        let rows = whole.chunks_exact(columns.width).skip(first / per_row).take(count / per_row);
        Ok(rows.flat_map(|row| row.iter().skip(columns.first).step_by(columns.step)).copied().collect())
    }

    /// Values `first..first + count` as they lie in the file.
    fn read_values(&self, reader: &Reader, first: usize, count: usize) -> Result<Vec<f32>> {
        let size = self.element.size_bytes();
        let mut bytes = vec![0; count * size];
        reader.read(Place { offset: self.place.offset + (first * size) as u64, ..self.place }, &mut bytes)?;
        let mut values = vec![0.0; count];
        cast::widen(reader.cpu, self.element, &bytes, &mut values)
            .map_err(|error| reader.refuse(&error.to_string()))?;
        if kernel::all_finite(&values) {
            return Ok(values);
        }
        let file = reader.path(self.place).display();
        Err(Error::Checkpoint(format!(
            "tensor {:?}: its adapter in {file} holds infinite or undefined values; it cannot be merged",
            reader.tensor
        )))
    }
}

impl Columns {
    fn count(self) -> usize {
        (self.width - self.first).div_ceil(self.step)
    }
}

fn check_columns(check: &Check, (first, step): (u64, u64), width: usize) -> Result<Columns> {
    let small = |value| usize::try_from(value).ok();
    match small(first).zip(small(step)) {
        Some((first, step)) if first < step && step <= width && width.is_multiple_of(step) => {
            Ok(Columns { first, step, width })
        }
        _ => check.refuse(&format!("columns {first} and every {step} after it do not divide {width} evenly")),
    }
}

/// A source as rows x columns: the first dimension and the product of the others.
fn matrix(check: &Check, source: &Source) -> Result<(usize, usize)> {
    let product = source
        .shape
        .iter()
        .skip(1)
        .try_fold(1_usize, |product, size| product.checked_mul(usize::try_from(*size).ok()?));
    let rows = usize::try_from(source.num_rows()).ok();
    match rows.zip(product) {
        Some((rows, columns)) if source.shape.len() >= 2 && rows.checked_mul(columns).is_some() => Ok((rows, columns)),
        _ => check.refuse(&format!("{:?} is no matrix", source.shape)),
    }
}

fn check_spans(
    check: &Check,
    spans: &[(u64, u64, u64)],
    num_rows: usize,
    left_rows: usize,
) -> Result<Vec<(usize, usize, usize)>> {
    let mut checked = Vec::with_capacity(spans.len());
    for (row, product_row, count) in spans {
        let inside = |first: u64, rows: usize| first.checked_add(*count).is_some_and(|end| end <= rows as u64);
        if !inside(*row, num_rows) || !inside(*product_row, left_rows) {
            return check.refuse(&format!("rows [{row}, {product_row}, {count}] do not fit a weight of {num_rows} and a product of {left_rows} rows"));
        }
        let small = |value: u64| usize::try_from(value).or_else(|_| check.refuse("too many rows"));
        checked.push((small(*row)?, small(*product_row)?, small(*count)?));
    }
    checked.sort_unstable();
    if checked.windows(2).any(|pair| pair[0].0 + pair[0].2 > pair[1].0) {
        return check.refuse("the rows of a product go to the same row of the weight twice");
    }
    Ok(checked)
}
