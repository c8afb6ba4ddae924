//! A weight with low-rank products: which rows get which product, and the factors in the kernel's layout. A vector
//! with vectors added is the same with products of rank 1 and one column.

use std::sync::{Arc, Mutex, PoisonError};

use fastft_checkpoint::{Error, Result};
use fastft_kernels::merge::{self as kernel, Band, Base, Left, Panels, Rounding};
use fastft_kernels::{Element, cast};

use crate::content::{self, Content};
use crate::device;
use crate::job::{Check, Place};
use crate::plan::{Addend, Delta, Source};
use crate::tile::Reader;

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
    /// `None`: the number 1.
    right: Option<Factor>,
    rank: usize,
    scale: f32,
    /// Whether the factors are those of the transposed product: left is (rank, rows), right is (columns, rank).
    transposed: bool,
    /// (row of the weight, row of the product, number of rows)
    spans: Vec<(usize, usize, usize)>,
}

/// A factor in its file.
#[derive(Clone, Copy, Debug)]
pub struct Factor {
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
    /// The right factor as it lies in the file, where a device wants it.
    right_values: Vec<f32>,
}

impl Merge {
    /// Checks the shapes of a merge.
    pub fn check(check: &Check, source: &Source, to: Element, deltas: &[Delta], round_delta: bool) -> Result<Self> {
        let base = Content::check(check, source)?;
        let from = check.element(source.dtype)?;
        let (num_rows, columns) = matrix(check, source)?;
        let mut products = Vec::with_capacity(deltas.len());
        for delta in deltas {
            if delta.magnitude.is_some() {
                return check.refuse("a merge knows no magnitudes");
            }
            products.push(Product::check(check, num_rows, columns, delta)?);
        }
        let rounding = if round_delta { Rounding::DeltaFirst } else { Rounding::Once };
        Ok(Self { base, from, to, num_rows, columns, products, rounding, prepared: Mutex::new(None) })
    }

    /// Checks a merge into f32 whose rows take one product each.
    pub fn check_disjoint(check: &Check, source: &Source, deltas: &[Delta]) -> Result<Self> {
        let plain: Vec<_> = deltas.iter().map(|delta| Delta { magnitude: None, ..delta.clone() }).collect();
        let merge = Self::check(check, source, Element::F32, &plain, false)?;
        let mut spans: Vec<_> = merge.products.iter().flat_map(|product| &product.spans).collect();
        spans.sort_unstable();
        if spans.windows(2).any(|pair| pair[0].0 + pair[0].2 > pair[1].0) {
            return check.refuse("two products go to the same row of a weight with magnitudes");
        }
        Ok(merge)
    }

    /// Checks a vector with vectors added.
    pub fn check_shift(check: &Check, source: &Source, to: Element, addends: &[Addend]) -> Result<Self> {
        let base = Content::check(check, source)?;
        let from = check.element(source.dtype)?;
        let num_rows = content::num_values(check, source)?;
        let mut products = Vec::with_capacity(addends.len());
        for addend in addends {
            let left = Factor::check_vector(check, &addend.source)?;
            let spans = match &addend.rows {
                Some(spans) => check_spans(check, spans, num_rows, left.num_values)?,
                None if left.num_values == num_rows => vec![(0, 0, num_rows)],
                None => {
                    return check.refuse(&format!("{:?} cannot be added to {num_rows} values", addend.source.shape));
                }
            };
            let scale = check_scale(check, addend.scale)?;
            products.push(Product { left, right: None, rank: 1, scale, transposed: false, spans });
        }
        let (rounding, prepared) = (Rounding::Once, Mutex::new(None));
        Ok(Self { base, from, to, num_rows, columns: 1, products, rounding, prepared })
    }

    /// Rows of the weight.
    pub fn num_rows(&self) -> u64 {
        self.num_rows as u64
    }

    /// Columns of the weight.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Makes rows `first..first + output / row size` of the merged weight.
    pub fn make(&self, reader: &Reader, first: usize, input: &mut Vec<u8>, output: &mut [u8]) -> Result<()> {
        let prepared = self.prepared(reader)?;
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
            if let Some(device) = reader.device {
                let source = if in_place {
                    None
                } else {
                    Some(&input[(start - first) * base_row_bytes..(end - first) * base_row_bytes])
                };
                let target = &mut output[(start - first) * row_bytes..(end - first) * row_bytes];
                let kept = self.on_device(reader, device, &prepared, &lefts, (start, end), source, target)?;
                self.check_kept(reader, kept, start, end)?;
                continue;
            }
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
            self.check_kept(reader, kept, start, end)?;
        }
        Ok(())
    }

    fn check_kept(&self, reader: &Reader, kept: bool, start: usize, end: usize) -> Result<()> {
        if kept {
            return Ok(());
        }
        Err(reader.refuse(&format!(
            "the merge makes an infinite or undefined value in rows {start} to {end} (dtype {:?}); merge into a wider dtype or with a smaller scale",
            self.to
        )))
    }

    /// The same band on a device; `source`: the base where it does not stand in `target` already.
    #[expect(clippy::too_many_arguments, reason = "what the loop of `make` has at hand")]
    fn on_device(
        &self,
        reader: &Reader,
        device: &dyn device::Device,
        prepared: &[Prepared],
        lefts: &[LeftRows],
        (start, end): (usize, usize),
        source: Option<&[u8]>,
        target: &mut [u8],
    ) -> Result<bool> {
        if lefts.is_empty() && source.is_none() {
            return Ok(true);
        }
        let band = device::Band {
            tensor: reader.tensor,
            rows: end - start,
            columns: self.columns,
            from: self.from,
            to: self.to,
            round_delta: self.rounding == Rounding::DeltaFirst,
            products: lefts.iter().map(|left| left.for_device(prepared, end - start)).collect(),
        };
        device.merge(&band, source, target)
    }

    /// Forgets the factors: no more tiles will come.
    pub fn finish(&self, tensor: &str, device: Option<&dyn device::Device>) {
        if let Some(device) = device {
            device.finish(tensor);
        }
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
        if let Some(device) = reader.device {
            let rights = self.products.iter().zip(made.iter()).map(|(product, made)| device::Right {
                values: &made.right_values,
                rank: product.rank,
                transposed: product.transposed,
            });
            device.prepare(reader.tensor, &rights.collect::<Vec<_>>())?;
        }
        *prepared = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Cuts rows `start..end` where a product begins or ends.
    pub fn bands(&self, start: usize, end: usize) -> Vec<(usize, usize)> {
        let spans = self.products.iter().flat_map(|product| &product.spans);
        let edges = spans.flat_map(|(row, _, count)| [*row, row + count]);
        let mut cuts: Vec<_> = edges.filter(|edge| (start..end).contains(edge)).chain([start, end]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|pair| (pair[0], pair[1])).collect()
    }

    /// The product whose rows begin or go on at `row` of the weight, with its row there; the first of several.
    pub fn product_at(&self, row: usize) -> Option<(usize, usize)> {
        self.products.iter().enumerate().find_map(|(index, product)| Some((index, product.row_at(row)?)))
    }

    /// The left factors of the products that reach the band `start..end`.
    fn lefts(&self, reader: &Reader, prepared: &[Prepared], start: usize, end: usize) -> Result<Vec<LeftRows<'_>>> {
        let mut lefts = Vec::new();
        for (index, product) in self.products.iter().enumerate() {
            let Some(first) = product.row_at(start) else { continue };
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
    /// The rows of the band by themselves.
    fn for_device(&self, prepared: &[Prepared], rows: usize) -> device::Left {
        let rank = self.product.rank;
        let values = if self.product.transposed {
            let all = &prepared[self.index].left;
            let stride = all.len() / rank;
            (self.first..self.first + rows).flat_map(|row| (0..rank).map(move |k| all[k * stride + row])).collect()
        } else {
            self.values.clone()
        };
        device::Left { right: self.index, values, rank, scale: self.product.scale }
    }

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
        let scale = check_scale(check, delta.scale)?;
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
        Ok(Self { left, right: Some(right), rank, scale, transposed: delta.transposed, spans })
    }

    /// The row of the product that goes to `row` of the weight.
    fn row_at(&self, row: usize) -> Option<usize> {
        let (to, of, _) = self.spans.iter().find(|(to, _, count)| (*to..to + count).contains(&row))?;
        Some(of + row - to)
    }

    fn prepare(&self, reader: &Reader, columns: usize) -> Result<Prepared> {
        let right = self.right.map_or_else(|| Ok(vec![1.0]), |right| right.read(reader, 0, right.num_values))?;
        let panels = if self.transposed {
            Panels::from_columns(self.rank, columns, &right)
        } else {
            Panels::from_rows(self.rank, columns, &right)
        };
        let left = if self.transposed { self.left.read(reader, 0, self.left.num_values)? } else { Vec::new() };
        let right_values = if reader.device.is_some() { right } else { Vec::new() };
        Ok(Prepared { right: panels.map_err(|error| reader.refuse(&error.to_string()))?, left, right_values })
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

    /// A factor of one number for each row or column, whatever its shape.
    pub fn check_vector(check: &Check, source: &Source) -> Result<Self> {
        let num_values = content::num_values(check, source)?;
        let flat = Source { shape: vec![num_values as u64, 1], ..source.clone() };
        Self::check(check, &flat, None)
    }

    /// Number of values.
    pub fn num_values(&self) -> usize {
        self.num_values
    }

    /// Values `first..first + count` as f32, all of them finite; whole rows where columns are chosen.
    pub fn read(&self, reader: &Reader, first: usize, count: usize) -> Result<Vec<f32>> {
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

#[expect(clippy::cast_possible_truncation, reason = "the scale is an f32 from here on (formats 2.1)")]
fn check_scale(check: &Check, scale: f64) -> Result<f32> {
    if (scale as f32).is_finite() {
        return Ok(scale as f32);
    }
    check.refuse(&format!("the scale {scale} is no finite number"))
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
