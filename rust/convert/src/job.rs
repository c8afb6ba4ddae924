//! A plan checked against its files: everything that can be refused is refused here, before the first byte is written.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Mutex;

use fastft_checkpoint::{Dtype, Error, Input, Layout, Result, TensorSpec};
use fastft_kernels::Element;

use crate::content::{self, Content};
use crate::dora::Dora;
use crate::merge::Merge;
use crate::plan::{Operation, Part, Plan, Source, Tensor};
use crate::quantize::{Companion, Quantize};

/// A checked plan with its open files.
#[derive(Debug)]
pub struct Job {
    pub(crate) inputs: Vec<Input>,
    pub(crate) files: Vec<File>,
    pub(crate) tensors: Vec<Made>,
    /// Bytes of all tensors that will be written.
    pub(crate) total_bytes: u64,
    /// As in [`Plan::finite`].
    finite: bool,
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
    /// What its values are, where none may be infinite or undefined.
    pub must_be_finite: Option<Element>,
}

/// How the rows of a tensor are made.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A row is a byte.
    Copy { place: Place },
    /// A row is a value; the same dtype on both sides where the source is 4-bit.
    Cast { content: Content, from: Number, to: Element },
    /// Rows are gathered; `to` is `None` where no part needs a cast.
    Rows { parts: Vec<PartPlace>, to: Option<Element> },
    /// Rows are read and low-rank products added.
    Merge(Box<Merge>),
    /// The same, and rows or columns scaled to their magnitudes.
    Dora(Box<Dora>),
    /// A row is a byte.
    Bytes(Vec<u8>),
    /// Rows are those of the operation inside.
    Quantize(Box<Quantize>),
    /// Written with the tensor whose scales it holds.
    Companion,
}

/// Where values start in which input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub input: usize,
    pub offset: u64,
}

/// A part of a gathered tensor.
#[derive(Debug)]
pub(crate) struct PartPlace {
    pub content: Content,
    /// The row of the source that comes first.
    pub start: u64,
    /// `None`: the bytes are copied.
    pub from: Option<Number>,
    /// Bytes of a row of the source.
    pub row_bytes: u64,
    /// Bytes of a number of the source.
    pub value_bytes: usize,
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
        let mut job = Self { inputs, files: Vec::new(), tensors: Vec::new(), total_bytes: 0, finite: plan.finite };
        let mut paths = HashSet::new();
        let mut companions = Vec::new();
        for shard in plan.shards {
            if !paths.insert(shard.path.clone()) {
                return Err(Error::Plan(format!("{}: the plan writes this file twice", shard.path.display())));
            }
            job.add_file(shard.path, &shard.metadata, shard.tensors, &mut companions)?;
        }
        job.join_companions(&companions)?;
        Ok(job)
    }

    /// Bytes of all tensors that will be written.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Tells each quantized tensor where its scales go.
    fn join_companions(&mut self, companions: &[Wanted]) -> Result<()> {
        let mut by_name = HashMap::new();
        for (index, made) in self.tensors.iter().enumerate() {
            if matches!(made.kind, Kind::Quantize(_)) && by_name.insert(made.name.clone(), index).is_some() {
                return Err(Error::Plan(format!("tensor {:?}: the plan quantizes two of this name", made.name)));
            }
        }
        for wanted in companions {
            let companion = &self.tensors[wanted.index];
            let (file, offset, nbytes) = (companion.file, companion.offset, companion.row_bytes);
            let check = Check { tensor: &companion.name, inputs: &self.inputs };
            let Some(index) = by_name.get(&wanted.of) else {
                return check.refuse(&format!("there is no quantized tensor {:?}", wanted.of));
            };
            let refused = check.refuse(&format!("it does not fit the scales of {:?}", wanted.of));
            let made = &mut self.tensors[*index];
            let before = made.file <= file;
            let Kind::Quantize(quantize) = &mut made.kind else { return refused };
            let count = quantize.num_values.div_ceil(quantize.blocks.size());
            let expected = match (wanted.nested, quantize.offset) {
                (false, None) => Some((Dtype::F32, count)),
                (false, Some(_)) => Some((Dtype::U8, count)),
                (true, Some(_)) => Some((Dtype::F32, count.div_ceil(fastft_kernels::nf4::nested::BLOCK))),
                (true, None) => None,
            };
            let fits = expected.is_some_and(|(dtype, count)| {
                dtype == wanted.dtype && nbytes == (count * if dtype == Dtype::F32 { 4 } else { 1 }) as u64
            });
            let twice = quantize.companions.iter().any(|known| known.nested == wanted.nested);
            if !fits || !before || twice {
                return refused;
            }
            quantize.companions.push(Companion { file, offset, nested: wanted.nested });
        }
        for made in &self.tensors {
            if let Kind::Quantize(quantize) = &made.kind
                && quantize.companions.len() != 1 + usize::from(quantize.offset.is_some())
            {
                return Err(Error::Plan(format!("tensor {:?}: the plan does not write all of its scales", made.name)));
            }
        }
        Ok(())
    }

    fn add_file(
        &mut self,
        path: PathBuf,
        metadata: &BTreeMap<String, String>,
        tensors: Vec<Tensor>,
        companions: &mut Vec<Wanted>,
    ) -> Result<()> {
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
            let row_bytes = match &kind {
                Kind::Quantize(quantize) => (quantize.row_values * quantize.element.size_bytes()) as u64,
                _ => placed.nbytes.checked_div(num_rows).unwrap_or(0),
            };
            if let Operation::AbsmaxOf { tensor: of } | Operation::NestedAbsmaxOf { tensor: of } = &tensor.op {
                let nested = matches!(tensor.op, Operation::NestedAbsmaxOf { .. });
                companions.push(Wanted { index: self.tensors.len(), of: of.clone(), nested, dtype: tensor.dtype });
            }
            self.total_bytes += placed.nbytes;
            let file = self.files.len();
            let must_be_finite = if self.finite { check.element(tensor.dtype).ok() } else { None };
            self.tensors.push(Made {
                name: tensor.name,
                file,
                offset: placed.offset,
                num_rows,
                row_bytes,
                kind,
                must_be_finite,
            });
        }
        self.files.push(File { path, head: layout.head, size_bytes: layout.size_bytes });
        Ok(())
    }
}

/// A tensor of scales that waits for the tensor that they belong to.
struct Wanted {
    index: usize,
    of: String,
    nested: bool,
    dtype: Dtype,
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
                let content = Content::check(self, source)?;
                if source.dtype != tensor.dtype || source.dtype.size_bytes(&source.shape) != Some(nbytes) {
                    return self.refuse(&format!(
                        "a copy of {} {:?} cannot be {} {:?}",
                        source.dtype.name(),
                        source.shape,
                        tensor.dtype.name(),
                        tensor.shape
                    ));
                }
                self.copy(source, content, nbytes)
            }
            Operation::Cast { source } => self.cast(tensor, source, nbytes),
            Operation::Rows { parts } => self.rows(tensor, parts),
            Operation::Join { parts } => self.join(tensor, parts),
            Operation::Merge { source, deltas, round_delta } => {
                self.same_count(tensor, source)?;
                let merge = Merge::check(self, source, self.element(tensor.dtype)?, deltas, *round_delta)?;
                Ok((merge.num_rows(), Kind::Merge(Box::new(merge))))
            }
            Operation::Dora { source, deltas } => {
                self.same_count(tensor, source)?;
                let dora = Dora::check(self, source, self.element(tensor.dtype)?, deltas)?;
                Ok((dora.num_rows(), Kind::Dora(Box::new(dora))))
            }
            Operation::Shift { source, addends } => {
                self.same_count(tensor, source)?;
                let merge = Merge::check_shift(self, source, self.element(tensor.dtype)?, addends)?;
                Ok((merge.num_rows(), Kind::Merge(Box::new(merge))))
            }
            Operation::Bytes { hex } => {
                let bytes = self.bytes(hex)?;
                if bytes.len() as u64 != nbytes {
                    return self.refuse(&format!("{} given bytes are not {nbytes}", bytes.len()));
                }
                Ok((nbytes, Kind::Bytes(bytes)))
            }
            Operation::Quantize { .. } => self.quantize(tensor, nbytes),
            Operation::AbsmaxOf { .. } | Operation::NestedAbsmaxOf { .. } => Ok((1, Kind::Companion)),
        }
    }

    /// A copy: by the system where the bytes lie as they are wanted.
    fn copy(&self, source: &Source, content: Content, nbytes: u64) -> Result<(u64, Kind)> {
        if let Some(place) = content.place() {
            return Ok((nbytes, Kind::Copy { place }));
        }
        let to = self.element(source.dtype)?;
        Ok((nbytes / to.size_bytes() as u64, Kind::Cast { content, from: Number::Element(to), to }))
    }

    fn bytes(&self, hex: &str) -> Result<Vec<u8>> {
        let digit = |sign: u8| char::from(sign).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let pairs = hex.as_bytes().chunks(2);
        let bytes = pairs.map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        });
        bytes.collect::<Option<_>>().map_or_else(|| self.refuse("its bytes are not in hex"), Ok)
    }

    fn quantize(&self, tensor: &Tensor, nbytes: u64) -> Result<(u64, Kind)> {
        let Operation::Quantize { of, dtype, shape, quant_type, blocksize, offset, transposed } = &tensor.op else {
            return self.refuse("it is not quantized");
        };
        if matches!(
            **of,
            Operation::Quantize { .. }
                | Operation::Bytes { .. }
                | Operation::AbsmaxOf { .. }
                | Operation::NestedAbsmaxOf { .. }
        ) {
            return self.refuse("only numbers can be quantized");
        }
        let element = self.element(*dtype)?;
        let numbers = Tensor { name: tensor.name.clone(), dtype: *dtype, shape: shape.clone(), op: (**of).clone() };
        let Some(number_bytes) = dtype.size_bytes(shape) else { return self.refuse("it is too large") };
        let (mut num_rows, mut inner) = self.kind(&numbers, number_bytes)?;
        if let Kind::Copy { .. } = inner {
            let (Operation::Copy { source } | Operation::Cast { source }) = &**of else {
                return self.refuse("only numbers can be quantized");
            };
            inner = Kind::Cast { content: Content::check(self, source)?, from: Number::Element(element), to: element };
            num_rows = number_bytes / element.size_bytes() as u64;
        }
        let small = |size: u64| usize::try_from(size).or_else(|_| self.refuse("it is too large for this machine"));
        let num_values = small(number_bytes / element.size_bytes() as u64)?;
        if tensor.dtype != Dtype::U8 || nbytes != num_values.div_ceil(2) as u64 || num_values == 0 {
            return self.refuse(&format!(
                "{num_values} numbers in 4 bit are not {} {:?}",
                tensor.dtype.name(),
                tensor.shape
            ));
        }
        let transposed = match (transposed, &shape[..]) {
            (false, _) => None,
            (true, [rows, columns]) => Some((small(*rows)?, small(*columns)?)),
            (true, _) => return self.refuse(&format!("{shape:?} has no transpose; two dimensions are needed")),
        };
        let quantize = Quantize {
            inner,
            row_values: num_values / small(num_rows)?.max(1),
            num_values,
            element,
            blocks: content::blocks(self, quant_type, *blocksize)?,
            offset: offset.map(|value| content::offset(self, value)).transpose()?,
            transposed,
            absmax: Mutex::default(),
            companions: Vec::new(),
        };
        Ok((num_rows, Kind::Quantize(Box::new(quantize))))
    }

    fn cast(&self, tensor: &Tensor, source: &Source, nbytes: u64) -> Result<(u64, Kind)> {
        let content = Content::check(self, source)?;
        self.same_count(tensor, source)?;
        if source.dtype == tensor.dtype {
            return self.copy(source, content, nbytes);
        }
        let to = self.element(tensor.dtype)?;
        let kind = Kind::Cast { content, from: self.number(source.dtype)?, to };
        Ok((nbytes / to.size_bytes() as u64, kind))
    }

    fn rows(&self, tensor: &Tensor, parts: &[Part]) -> Result<(u64, Kind)> {
        let Some((num_rows, rest)) = tensor.shape.split_first() else {
            return self.refuse("rows need a tensor with at least one dimension");
        };
        let mut first_row = 0_u64;
        let mut places = Vec::with_capacity(parts.len());
        for part in parts {
            let content = Content::check(self, &part.source)?;
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
            let value_bytes = usize::try_from(part.source.dtype.size_bytes(&[1]).unwrap_or(1)).unwrap_or(1);
            let (start, num_rows) = (part.start, part.count);
            places.push(PartPlace { content, start, from, row_bytes, value_bytes, first_row, num_rows });
            first_row = first_row.saturating_add(part.count);
        }
        if first_row != *num_rows {
            return self.refuse(&format!("the parts have {first_row} rows, the tensor has {num_rows}"));
        }
        let casts = places.iter().any(|place| place.from.is_some());
        let to = if casts { Some(self.element(tensor.dtype)?) } else { None };
        Ok((*num_rows, Kind::Rows { parts: places, to }))
    }

    /// A joined tensor is gathered; a row is a value.
    fn join(&self, tensor: &Tensor, parts: &[Source]) -> Result<(u64, Kind)> {
        let Some(num_values) = tensor.shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size)) else {
            return self.refuse("it is too large for this machine");
        };
        let flat = Tensor { shape: vec![num_values], ..tensor.clone() };
        let mut whole = Vec::with_capacity(parts.len());
        for part in parts {
            let count = content::num_values(self, part)? as u64;
            let source = Source { shape: vec![count], ..part.clone() };
            whole.push(Part { source, start: 0, count });
        }
        self.rows(&flat, &whole)
    }

    /// Where a source is, if it lies inside its file.
    pub fn place(&self, source: &Source) -> Result<Place> {
        let Some(input) = self.inputs.get(source.file) else {
            return self.refuse(&format!("there is no file {}; the plan names {}", source.file, self.inputs.len()));
        };
        let nbytes = match &source.packed {
            Some(_) => content::num_values(self, source).ok().map(|count| count.div_ceil(2) as u64),
            None => source.seen.as_ref().map_or(source.dtype, |seen| seen.stored).size_bytes(&source.shape),
        };
        let end = nbytes.and_then(|nbytes| source.offset.checked_add(nbytes));
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

    /// The same, or F64, which can only be read.
    pub fn number(&self, dtype: Dtype) -> Result<Number> {
        match dtype {
            Dtype::F32 => Ok(Number::Element(Element::F32)),
            Dtype::F16 => Ok(Number::Element(Element::F16)),
            Dtype::BF16 => Ok(Number::Element(Element::Bf16)),
            Dtype::F64 => Ok(Number::F64),
            other => self.refuse(&format!("{} stands where only floating point (F32, F16, BF16) can", other.name())),
        }
    }
}
