//! A file that is written in pieces by several threads and whose full length means full content.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::error::{Error, Result};

/// A new file that grows up to a length known from the start.
///
/// Pieces may come in any order. The one that ends the file waits until all others are written: a file cut off by a
/// crash is shorter than its header says, so no reader takes it for whole.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Debug)]
struct Progress {
    written_bytes: u64,
    given_up: bool,
}

impl Output {
    /// Creates the file, which must not exist yet.
    ///
    /// # Errors
    /// There is such a file already, or the folder does not allow one.
    pub fn create(path: &Path, size_bytes: u64) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|cause| Error::from_io("cannot create", path, &cause))?;
        let progress = Mutex::new(Progress { written_bytes: 0, given_up: false });
        Ok(Self { path: path.to_owned(), file, size_bytes, progress, changed: Condvar::new() })
    }

    /// The path as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `bytes` at `offset`; returns whether the file is now whole. No byte may be written twice.
    ///
    /// # Errors
    /// The disk refuses, the piece reaches over the end, or another thread gave up ([`Self::give_up`]).
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<bool> {
        let length = bytes.len() as u64;
        let end = offset.checked_add(length).filter(|end| *end <= self.size_bytes);
        let end = end.ok_or_else(|| Error::Plan(format!("{}: a piece reaches over the end", self.path.display())))?;
        if length > 0 && end == self.size_bytes {
            self.wait_for_the_rest(length)?;
        }
        self.file.write_all_at(bytes, offset).map_err(|cause| self.cannot_write(&cause))?;
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.written_bytes += length;
        self.changed.notify_all();
        Ok(progress.written_bytes == self.size_bytes)
    }

    fn cannot_write(&self, cause: &io::Error) -> Error {
        Error::from_io("cannot write", &self.path, cause)
    }

    fn wait_for_the_rest(&self, length: u64) -> Result<()> {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = |progress: &mut Progress| !progress.given_up && progress.written_bytes + length < self.size_bytes;
        let progress = self.changed.wait_while(progress, missing).unwrap_or_else(PoisonError::into_inner);
        if progress.given_up {
            return Err(Error::File(format!("{}: given up before it was whole", self.path.display())));
        }
        Ok(())
    }

    /// Frees a thread that waits to write the last piece: it will never be due.
    pub fn give_up(&self) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).given_up = true;
        self.changed.notify_all();
    }

    /// Returns when the file is on the disk.
    ///
    /// # Errors
    /// The disk failed.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|cause| Error::from_io("cannot flush", &self.path, &cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn the_last_piece_waits_for_the_others() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("file");
        let output = Output::create(&path, 6)?;
        std::thread::scope(|scope| -> Outcome {
            let last = scope.spawn(|| output.write_at(b"ef", 4));
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert_eq!(std::fs::metadata(&path)?.len(), 0, "the last piece was written first");
            assert!(!output.write_at(b"cd", 2)?);
            output.write_at(b"ab", 0)?;
            assert!(last.join().map_err(|_| "panicked")??);
            Ok(())
        })?;
        assert_eq!(std::fs::read(&path)?, b"abcdef");
        Ok(())
    }

    #[test]
    fn giving_up_frees_the_thread_that_waits() -> Outcome {
        let folder = tempfile::tempdir()?;
        let output = Output::create(&folder.path().join("file"), 6)?;
        std::thread::scope(|scope| -> Outcome {
            let last = scope.spawn(|| output.write_at(b"ef", 4));
            output.give_up();
            assert!(last.join().map_err(|_| "panicked")?.is_err());
            Ok(())
        })
    }

    #[test]
    fn an_existing_file_is_left_alone() -> Outcome {
        let file = tempfile::NamedTempFile::new()?;
        assert!(Output::create(file.path(), 1).is_err());
        Ok(())
    }

    #[test]
    fn a_piece_over_the_end_is_refused() -> Outcome {
        let folder = tempfile::tempdir()?;
        let output = Output::create(&folder.path().join("file"), 3)?;
        assert!(output.write_at(b"abcd", 0).is_err());
        Ok(())
    }
}
