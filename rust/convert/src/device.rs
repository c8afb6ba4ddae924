//! Arithmetic elsewhere: a merge can hand its bands to a device (a GPU), which must give the bits of the CPU.

use fastft_checkpoint::Result;
use fastft_kernels::Element;

/// Does the products and sums of merges; called by several workers at once.
pub trait Device: Sync {
    /// Takes the right factors of a tensor; before its first band.
    ///
    /// # Errors
    /// What the device says.
    fn prepare(&self, tensor: &str, rights: &[Right]) -> Result<()>;

    /// Writes the merged rows into `target`, which holds the base's where `base` is `None`; whether every finite base value
    /// stayed finite. One that is not finite stays as it is.
    ///
    /// # Errors
    /// What the device says.
    fn merge(&self, band: &Band, base: Option<&[u8]>, target: &mut [u8]) -> Result<bool>;

    /// Forgets the right factors: no more bands will come.
    fn finish(&self, tensor: &str);
}

/// A right factor, (rank, columns) or with `transposed` (columns, rank), f32.
#[derive(Debug)]
pub struct Right<'a> {
    /// Row-major.
    pub values: &'a [f32],
    /// Rank of the product.
    pub rank: usize,
    /// Whether the columns lie one after the other.
    pub transposed: bool,
}

/// Rows of a weight, and what is added to them.
#[derive(Debug)]
pub struct Band<'a> {
    /// Name of the weight.
    pub tensor: &'a str,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// Of the base.
    pub from: Element,
    /// Of the result.
    pub to: Element,
    /// Whether the sum of the products is rounded before it is added.
    pub round_delta: bool,
    /// Products in the order in which they are summed.
    pub products: Vec<Left>,
}

/// A left factor.
#[derive(Debug)]
pub struct Left {
    /// Which of the right factors it is multiplied with.
    pub right: usize,
    /// (rows, rank), f32, row-major.
    pub values: Vec<f32>,
    /// Rank of the product.
    pub rank: usize,
    /// What the product is multiplied by.
    pub scale: f32,
}
