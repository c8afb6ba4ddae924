//! What can go wrong with a file of weights. The border turns each kind into the class of `fastft.errors` of that name.

use std::io;
use std::path::Path;

use thiserror::Error;

/// A failure that the user can mend; its text is a whole sentence with file and reason.
#[derive(Clone, Debug, Error)]
pub enum Error {
    /// A file of weights is broken or of a kind that cannot be read: `CheckpointError`.
    #[error("{0}")]
    Checkpoint(String),
    /// The disk, a path or a permission stands in the way: `FileError`.
    #[error("{0}")]
    File(String),
    /// The same where the system said why: `FileError` with that `errno`.
    #[error("{0}")]
    System(String, i32),
    /// What is asked for cannot be right: `PlanError`.
    #[error("{0}")]
    Plan(String),
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// `doing` (as in "cannot read") failed for `path` with `cause`.
    #[must_use]
    pub fn from_io(doing: &str, path: &Path, cause: &io::Error) -> Self {
        let number = cause.raw_os_error();
        let advice = match number {
            Some(5) => "; the disk failed, the system's log may say more",
            Some(24) => "; too many files are open (ulimit -n)",
            Some(27) => "; no file may be so large there (ulimit -f, or the file system's own limit)",
            Some(28) => "; make room on that disk and run again",
            Some(122) => "; your quota there is used up",
            _ => "",
        };
        let text = format!("{doing} {}: {cause}{advice}", path.display());
        match number {
            Some(number) => Self::System(text, number),
            None => Self::File(text),
        }
    }
}
