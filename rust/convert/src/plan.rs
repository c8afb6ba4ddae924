//! The plan as Python writes it: JSON with every name spelled out and nothing left over.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fastft_checkpoint::{Dtype, Error, Result};
use serde::Deserialize;

/// A whole conversion.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The files that are read; sources name them by index.
    pub files: Vec<PathBuf>,
    /// The files that are written.
    pub shards: Vec<Shard>,
    /// Whether a weight (f32, f16, bf16) that is infinite or undefined is an error, copied ones included.
    #[serde(default)]
    pub finite: bool,
}

/// A file that is written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// Where; there must be no such file yet.
    pub path: PathBuf,
    /// The pairs of `__metadata__`.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Its tensors, in any order.
    pub tensors: Vec<Tensor>,
}

/// A tensor that is written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// What makes it.
    pub op: Operation,
}

/// What makes a tensor.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Operation {
    /// The bytes of the source.
    Copy {
        /// Same dtype, same number of values.
        source: Source,
    },
    /// The values of the source in the output's dtype, rounded once; a finite value that would become infinite is an error.
    Cast {
        /// Floating point, same number of values.
        source: Source,
    },
    /// Rows (of the first dimension) of one or more sources, one part after the other; cast when dtypes differ.
    Rows {
        /// The parts in the order of the output.
        parts: Vec<Part>,
    },
    /// The values of several sources, one after the other, whatever their shapes; cast when dtypes differ. A tensor that
    /// a sharded training left in pieces.
    Join {
        /// The pieces in the order of the output.
        parts: Vec<Source>,
    },
    /// The source plus low-rank products. Its rows are the first dimension of the *source's* shape.
    Merge {
        /// The base weight, same number of values as the output.
        source: Source,
        /// What is added.
        deltas: Vec<Delta>,
        /// Whether the sum of the products is rounded to the output's dtype before it is added (as PEFT does for
        /// embeddings and expert parameters), so that there are two roundings.
        #[serde(default)]
        round_delta: bool,
    },
    /// As a merge; then each row of a product with a magnitude is scaled to it (each column where the product is
    /// transposed). A row takes one product.
    Dora {
        /// The base weight, same number of values as the output.
        source: Source,
        /// What is added, with the magnitudes.
        deltas: Vec<Delta>,
    },
    /// The source, a vector, plus vectors.
    Shift {
        /// The base, same number of values as the output.
        source: Source,
        /// What is added.
        addends: Vec<Addend>,
    },
    /// Given bytes.
    Bytes {
        /// Two digits a byte.
        hex: String,
    },
    /// The packed 4-bit codes of what another operation makes: U8, (n/2 rounded up, 1). Its scales are other tensors.
    Quantize {
        /// What makes the numbers.
        of: Box<Operation>,
        /// Their dtype: they are rounded to it before they are quantized.
        dtype: Dtype,
        /// Their shape.
        shape: Vec<u64>,
        /// `nf4` or `fp4`.
        quant_type: String,
        /// Numbers of a block.
        blocksize: usize,
        /// With it the scales are quantized to 8 bit: their mean.
        #[serde(default)]
        offset: Option<f64>,
        /// Whether the transpose of the (two-dimensional) numbers is quantized, as bitsandbytes does for `Conv1D`.
        #[serde(default)]
        transposed: bool,
    },
    /// The scales of a quantized tensor: F32, or their U8 codes where they are quantized too.
    AbsmaxOf {
        /// The quantized tensor's name; in the same shard or an earlier one.
        tensor: String,
    },
    /// The scales of the codes of the scales of a quantized tensor, F32.
    NestedAbsmaxOf {
        /// As in [`Operation::AbsmaxOf`].
        tensor: String,
    },
}

/// A range of bytes of a file that holds a tensor, row-major and little-endian.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Index into [`Plan::files`].
    pub file: usize,
    /// First byte.
    pub offset: u64,
    /// Dtype of the values; with `packed` of those that come out.
    pub dtype: Dtype,
    /// Shape; with `packed` of the values that come out.
    pub shape: Vec<u64>,
    /// The bytes are 4-bit codes, dequantized as they are read.
    #[serde(default)]
    pub packed: Option<Box<Packed>>,
    /// The values are quantized to 4 bit and back as they are read: what a training on a 4-bit base saw.
    #[serde(default)]
    pub seen: Option<Seen>,
}

/// 4-bit codes of bitsandbytes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packed {
    /// `nf4` or `fp4`.
    pub quant_type: String,
    /// Numbers of a block.
    pub blocksize: usize,
    /// The scales: F32, or U8 with `nested`.
    pub absmax: Source,
    /// How the scales are held in 8 bit.
    #[serde(default)]
    pub nested: Option<Nested>,
    /// Whether the codes are those of the transpose (`Conv1D`).
    #[serde(default)]
    pub transposed: bool,
}

/// Scales in 8 bit.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nested {
    /// The scale of each 256 scales, F32.
    pub absmax: Source,
    /// Their mean.
    pub offset: f64,
}

/// A round trip through 4 bit.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seen {
    /// `nf4` or `fp4`.
    pub quant_type: String,
    /// Numbers of a block.
    pub blocksize: usize,
    /// Dtype in the file; the values are rounded to the source's before and after.
    pub stored: Dtype,
    /// With it the scales go through 8 bit: their mean.
    #[serde(default)]
    pub offset: Option<f64>,
    /// Whether the blocks run over the transpose (`Conv1D`).
    #[serde(default)]
    pub transposed: bool,
}

/// Some rows of a source.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Where they are.
    pub source: Source,
    /// First row.
    pub start: u64,
    /// Number of rows.
    pub count: u64,
}

/// A low-rank product `scale * (B A)`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delta {
    /// A, (rank, inputs); later dimensions are flattened (convolutions).
    pub a: Source,
    /// B, (outputs, rank).
    pub b: Source,
    /// What the product is multiplied by; rounded to f32.
    pub scale: f64,
    /// Whether the transpose of the product is added (the weight is (inputs, outputs), as in GPT-2).
    #[serde(default)]
    pub transposed: bool,
    /// `[first, step]`: only the columns first, first + step, ... of `b` make the factor. The experts of a fused weight
    /// share one B whose fastest index is the expert. All columns when absent.
    #[serde(default)]
    pub b_columns: Option<(u64, u64)>,
    /// `[row of the weight, row of the product, number of rows]`: where which rows go; all of them when absent.
    #[serde(default)]
    pub rows: Option<Vec<(u64, u64, u64)>>,
    /// Of `DoRA`: the norm of each row of the product (of each column where it is transposed) after the update.
    #[serde(default)]
    pub magnitude: Option<Source>,
}

/// A vector `scale * v` that is added to another.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Addend {
    /// v.
    pub source: Source,
    /// What it is multiplied by; rounded to f32.
    pub scale: f64,
    /// As in [`Delta::rows`].
    #[serde(default)]
    pub rows: Option<Vec<(u64, u64, u64)>>,
}

impl Plan {
    /// Reads a plan.
    ///
    /// # Errors
    /// The text is no plan.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|error| Error::Plan(format!("run_plan: the plan cannot be read: {error}")))
    }
}

impl Source {
    /// Number of rows: the first dimension, 1 for a single value.
    #[must_use]
    pub fn num_rows(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }
}
