//! Renames that never destroy what they meet.

use std::io;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};

/// Renames `source` to `target`; fails with `AlreadyExists` if there is a target.
///
/// # Errors
/// What the system says; `InvalidInput` where the file system cannot do it.
pub fn rename_noreplace(source: &Path, target: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, source, CWD, target, RenameFlags::NOREPLACE)?)
}

/// Puts two existing files or folders into each other's place, in one step.
///
/// # Errors
/// What the system says; `InvalidInput` or `CrossesDevices` where the file system cannot do it.
pub fn rename_exchange(left: &Path, right: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, left, CWD, right, RenameFlags::EXCHANGE)?)
}
