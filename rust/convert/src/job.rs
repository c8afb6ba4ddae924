//! A plan checked against its files: everything that can be refused is refused here, before the first byte is written.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use fastft_checkpoint::{Dtype, Error, Input, Layout, Result, TensorSpec};
use fastft_kernels::Element;

use crate::merge::Merge;
use crate::plan::{Operation, Part, Plan, Source, Tensor};

/// A checked plan with its open files.
#[derive(Debug)]
pub struct Job {
    pub(crate) inputs: Vec<Input>,
    pub(crate) files: Vec<File>,
    pub(crate) tensors: Vec<Made>,
    /// Bytes of all tensors that will be written.
    pub(crate) total_bytes: u64,
}

/// A file that will be written.
#[derive(Debug)]
pub(crate) struct File {
    pub path: PathBuf,
    pub head: Vec<u8>,
    pub size_bytes: u64,
}

/// A tensor that will be written, as rows of equal size. Tensors stand in the order of their bytes.
#[derive(Debug)]
pub(crate) struct Made {
    pub name: String,
    pub file: usize,
    pub offset: u64,
    pub num_rows: u64,
    pub row_bytes: u64,
    pub kind: Kind,
}

/// How the rows of a tensor are made.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A row is a byte.
    Copy { place: Place },
    /// A row is a value.
    Cast { place: Place, from: Number, to: Element },
    /// Rows are gathered; `to` is `None` where no part needs a cast.
    Rows { parts: Vec<PartPlace>, to: Option<Element> },
    /// Rows are read and low-rank products added.
    Merge(Box<Merge>),
}

/// Where values start in which input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub input: usize,
    pub offset: u64,
}

/// A part of a gathered tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartPlace {
    /// Of its first row.
    pub place: Place,
    /// `None`: the bytes are copied.
    pub from: Option<Number>,
    pub row_bytes: u64,
    pub first_row: u64,
    pub num_rows: u64,
}

/// A floating-point dtype that can be cast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Number {
    Element(Element),
    F64,
}

impl Job {
    /// Opens the files of `plan` and checks every operation.
    ///
    /// # Errors
    /// A file cannot be opened, a range lies outside its file, a shape or dtype does not fit its operation, or a name
    /// stands twice.
    pub fn new(plan: Plan) -> Result<Self> {
        let inputs = plan.files.iter().map(|path| Input::open(path)).collect::<Result<Vec<_>>>()?;
        let mut job = Self { inputs, files: Vec::new(), tensors: Vec::new(), total_bytes: 0 };
        let mut paths = HashSet::new();
        for shard in plan.shards {
            if !paths.insert(shard.path.clone()) {
                return Err(Error::Plan(format!("{}: the plan writes this file twice", shard.path.display())));
            }
            job.add_file(shard.path, &shard.metadata, shard.tensors)?;
        }
        Ok(job)
    }

    /// Bytes of all tensors that will be written.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    fn add_file(&mut self, path: PathBuf, metadata: &BTreeMap<String, String>, tensors: Vec<Tensor>) -> Result<()> {
        let specs: Vec<_> = tensors.iter().map(spec).collect();
        let in_file = |error| match error {
            Error::Plan(reason) => Error::Plan(format!("{}: {reason}", path.display())),
            other => other,
        };
        let layout = Layout::new(&specs, metadata).map_err(in_file)?;
        let mut tensors: Vec<_> = tensors.into_iter().map(Some).collect();
        for placed in &layout.placed {
            let Some(tensor) = tensors[placed.index].take() else { continue };
            let check = Check { tensor: &tensor.name, inputs: &self.inputs };
            let (num_rows, kind) = check.kind(&tensor, placed.nbytes)?;
            let row_bytes = placed.nbytes.checked_div(num_rows).unwrap_or(0);
            self.total_bytes += placed.nbytes;
            let file = self.files.len();
            self.tensors.push(Made { name: tensor.name, file, offset: placed.offset, num_rows, row_bytes, kind });
        }
        self.files.push(File { path, head: layout.head, size_bytes: layout.size_bytes });
        Ok(())
    }
}

fn spec(tensor: &Tensor) -> TensorSpec {
    TensorSpec { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone() }
}

/// Checks the operation of one tensor.
pub(crate) struct Check<'a> {
    tensor: &'a str,
    inputs: &'a [Input],
}

impl Check<'_> {
    /// An error that names the tensor.
    pub fn refuse<T>(&self, reason: &str) -> Result<T> {
        Err(Error::Plan(format!("tensor {:?}: {reason}", self.tensor)))
    }

    fn kind(&self, tensor: &Tensor, nbytes: u64) -> Result<(u64, Kind)> {
        match &tensor.op {
            Operation::Copy { source } => {
                let place = self.place(source)?;
                if source.dtype != tensor.dtype || source.dtype.size_bytes(&source.shape) != Some(nbytes) {
                    return self.refuse(&format!(
                        "a copy of {} {:?} cannot be {} {:?}",
                        source.dtype.name(),
                        source.shape,
                        tensor.dtype.name(),
                        tensor.shape
                    ));
                }
                Ok((nbytes, Kind::Copy { place }))
            }
            Operation::Cast { source } => self.cast(tensor, source, nbytes),
            Operation::Rows { parts } => self.rows(tensor, parts),
            Operation::Merge { source, deltas } => {
                self.same_count(tensor, source)?;
                let merge = Merge::check(self, source, self.element(tensor.dtype)?, deltas)?;
                Ok((merge.num_rows(), Kind::Merge(Box::new(merge))))
            }
        }
    }

    fn cast(&self, tensor: &Tensor, source: &Source, nbytes: u64) -> Result<(u64, Kind)> {
        let place = self.place(source)?;
        self.same_count(tensor, source)?;
        if source.dtype == tensor.dtype {
            return Ok((nbytes, Kind::Copy { place }));
        }
        let to = self.element(tensor.dtype)?;
        let kind = Kind::Cast { place, from: self.number(source.dtype)?, to };
        Ok((nbytes / to.size_bytes() as u64, kind))
    }

    fn rows(&self, tensor: &Tensor, parts: &[Part]) -> Result<(u64, Kind)> {
        let Some((num_rows, rest)) = tensor.shape.split_first() else {
            return self.refuse("rows need a tensor with at least one dimension");
        };
        let mut first_row = 0_u64;
        let mut places = Vec::with_capacity(parts.len());
        for part in parts {
            let place = self.place(&part.source)?;
            if part.source.shape.split_first().is_none_or(|(_, part_rest)| part_rest != rest) {
                return self.refuse(&format!("rows of {:?} do not fit {:?}", part.source.shape, tensor.shape));
            }
            if part.start.checked_add(part.count).is_none_or(|end| end > part.source.num_rows()) {
                return self.refuse(&format!(
                    "rows {} and {} more are not all in {:?}",
                    part.start, part.count, part.source.shape
                ));
            }
            let from = if part.source.dtype == tensor.dtype { None } else { Some(self.number(part.source.dtype)?) };
            let Some(row_bytes) = part.source.dtype.size_bytes(rest) else {
                return self.refuse("its rows do not fill whole bytes");
            };
            let place = Place { offset: place.offset + part.start * row_bytes, ..place };
            places.push(PartPlace { place, from, row_bytes, first_row, num_rows: part.count });
            first_row = first_row.saturating_add(part.count);
        }
        if first_row != *num_rows {
            return self.refuse(&format!("the parts have {first_row} rows, the tensor has {num_rows}"));
        }
        let casts = places.iter().any(|place| place.from.is_some());
        let to = if casts { Some(self.element(tensor.dtype)?) } else { None };
        Ok((*num_rows, Kind::Rows { parts: places, to }))
    }

    /// Where a source is, if it lies inside its file.
    pub fn place(&self, source: &Source) -> Result<Place> {
        let Some(input) = self.inputs.get(source.file) else {
            return self.refuse(&format!("there is no file {}; the plan names {}", source.file, self.inputs.len()));
        };
        let end = source.dtype.size_bytes(&source.shape).and_then(|nbytes| source.offset.checked_add(nbytes));
        if end.is_none_or(|end| end > input.size_bytes()) {
            return self.refuse(&format!(
                "{} {:?} at byte {} is not inside {} of {} bytes",
                source.dtype.name(),
                source.shape,
                source.offset,
                input.path().display(),
                input.size_bytes()
            ));
        }
        Ok(Place { input: source.file, offset: source.offset })
    }

    fn same_count(&self, tensor: &Tensor, source: &Source) -> Result<()> {
        let count = |shape: &[u64]| shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size));
        if count(&tensor.shape) == count(&source.shape) {
            return Ok(());
        }
        self.refuse(&format!("{:?} cannot be made of {:?}", tensor.shape, source.shape))
    }

    /// The element of a dtype that arithmetic is done in.
    pub fn element(&self, dtype: Dtype) -> Result<Element> {
        match self.number(dtype)? {
            Number::Element(element) => Ok(element),
            Number::F64 => self.refuse("F64 stands where only F32, F16 and BF16 can"),
        }
    }

    fn number(&self, dtype: Dtype) -> Result<Number> {
        match dtype {
            Dtype::F32 => Ok(Number::Element(Element::F32)),
            Dtype::F16 => Ok(Number::Element(Element::F16)),
            Dtype::BF16 => Ok(Number::Element(Element::Bf16)),
            Dtype::F64 => Ok(Number::F64),
            other => self.refuse(&format!("{} stands where only floating point (F32, F16, BF16) can", other.name())),
        }
    }
}
