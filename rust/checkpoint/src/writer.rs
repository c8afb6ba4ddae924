//! A file that is written in pieces by several threads and whose full length means full content.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use rustix::fs::{Advice, fadvise};

use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::reader::Input;

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

#[derive(Debug, Default)]
struct Progress {
    written_bytes: u64,
    given_up: bool,
    /// Pieces written since the last advice.
    fresh: Batch,
    /// Ranges that are on their way to the disk, oldest first.
    behind: VecDeque<Range<u64>>,
}

/// Batches that may stay in the page cache behind the newest one; older ones are dropped from it.
///
/// A model that fills the memory drives everything else out of it, and on a virtual machine the first touch of a page
/// can cost more than the copy: pages that are used again are cheaper.
const MOST_BEHIND: usize = 8;

impl Output {
    /// Creates the file, which must not exist yet.
    ///
    /// # Errors
    /// There is such a file already, or the folder does not allow one.
    pub fn create(path: &Path, size_bytes: u64) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|cause| Error::from_io("cannot create", path, &cause))?;
        let progress = Mutex::new(Progress::default());
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
        let piece = self.begin(offset, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset).map_err(|cause| self.cannot_write(&cause))?;
        Ok(self.end(&piece))
    }

    /// As [`Self::write_at`] for `length` bytes of `input` from `start` on, copied by the system without a way through
    /// this process; `None` if the system cannot do it between these two files (then nothing is written).
    ///
    /// # Errors
    /// As [`Self::write_at`]; also when the input ends too early.
    pub fn copy_at(&self, input: &Input, start: u64, length: u64, offset: u64) -> Result<Option<bool>> {
        let piece = self.begin(offset, length)?;
        let mut done = 0;
        while done < length {
            match input.copy_to((&self.file, &self.path), start + done, offset + done, length - done)? {
                Some(copied) => done += copied,
                None if done == 0 => return Ok(None),
                None => return Err(self.cannot_write(&io::Error::from(io::ErrorKind::Unsupported))),
            }
        }
        Ok(Some(self.end(&piece)))
    }

    /// Checks a piece, and waits if it is the one that ends the file.
    fn begin(&self, offset: u64, length: u64) -> Result<Range<u64>> {
        let end = offset.checked_add(length).filter(|end| *end <= self.size_bytes);
        let end = end.ok_or_else(|| Error::Plan(format!("{}: a piece reaches over the end", self.path.display())))?;
        if length > 0 && end == self.size_bytes {
            self.wait_for_the_rest(length)?;
        }
        Ok(offset..end)
    }

    /// Notes a piece that was written; whether the file is now whole.
    fn end(&self, piece: &Range<u64>) -> bool {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.written_bytes += piece.end - piece.start;
        self.changed.notify_all();
        let is_whole = progress.written_bytes == self.size_bytes;
        let advice = progress.leave_behind(piece.start, piece.end);
        drop(progress);
        advice.into_iter().flatten().for_each(|range| self.let_go(&range));
        is_whole
    }

    /// Has the dirty pages of a range written to the disk from now on, and drops those that are written already: that
    /// is what Linux makes of this advice. Where it does not, nothing is lost but time.
    fn let_go(&self, range: &Range<u64>) {
        let _ = fadvise(&self.file, range.start, NonZeroU64::new(range.end - range.start), Advice::DontNeed);
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

impl Progress {
    /// Notes a piece that was written; returns the ranges to let go: a full batch, and one that is old enough.
    fn leave_behind(&mut self, start: u64, end: u64) -> [Option<Range<u64>>; 2] {
        let Some(batch) = self.fresh.add(start..end) else {
            return [None, None];
        };
        self.behind.push_back(batch.clone());
        let old = if self.behind.len() > MOST_BEHIND { self.behind.pop_front() } else { None };
        [Some(batch), old]
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
    fn a_range_of_another_file_is_copied() -> Outcome {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("source"), b"0123456789")?;
        let input = Input::open(&folder.path().join("source"))?;
        let output = Output::create(&folder.path().join("file"), 6)?;
        assert!(!output.write_at(b"ab", 0)?);
        assert_eq!(output.copy_at(&input, 3, 4, 2)?, Some(true));
        assert_eq!(std::fs::read(folder.path().join("file"))?, b"ab3456");
        let output = Output::create(&folder.path().join("longer"), 6)?;
        assert!(
            matches!(output.copy_at(&input, 6, 6, 0), Err(Error::Checkpoint(message)) if message.contains("ends before byte 12"))
        );
        Ok(())
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
