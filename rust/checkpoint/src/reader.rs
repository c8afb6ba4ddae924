//! A file that is read by position.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::batch::Batch;
use crate::error::{Error, Result};

/// A regular file, open for reading by any number of threads.
#[derive(Debug)]
pub struct Input {
    path: PathBuf,
    file: File,
    state: State,
    used: Mutex<Batch>,
}

/// What must stay the same while a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    size_bytes: u64,
    modified: (i64, i64),
    device: u64,
    inode: u64,
}

impl State {
    fn of(metadata: &Metadata) -> Self {
        Self {
            size_bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

impl Input {
    /// Opens `path`, which must be a regular file: a pipe, a device or a folder is refused and never waited for.
    ///
    /// # Errors
    /// There is no such file, it may not be read, or it is no regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let cannot = |cause: &io::Error| Error::from_io("cannot open", path, cause);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| cannot(&errno.into()))?);
        let metadata = file.metadata().map_err(|cause| cannot(&cause))?;
        if !metadata.is_file() {
            return Err(Error::File(format!("cannot read {}: it is no regular file", path.display())));
        }
        Ok(Self { path: path.to_owned(), file, state: State::of(&metadata), used: Mutex::default() })
    }

    /// The path as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size when the file was opened.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.state.size_bytes
    }

    /// Fills `buffer` with the bytes from `offset` on.
    ///
    /// # Errors
    /// The file ends too early or cannot be read.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|cause| match cause.kind() {
            ErrorKind::UnexpectedEof => self.ends_before(offset.saturating_add(buffer.len() as u64)),
            _ => Error::from_io("cannot read", &self.path, &cause),
        })
    }

    fn ends_before(&self, end: u64) -> Error {
        let path = self.path.display();
        Error::Checkpoint(format!(
            "{path}: the file ends before byte {end}; it is cut off or changed while it was read"
        ))
    }

    /// Has the system copy at most `length` bytes from `start` into `target`; how many it copied, at least 1, or `None`
    /// where the file systems cannot do it.
    pub(crate) fn copy_to(
        &self,
        (target, target_path): (&File, &Path),
        start: u64,
        offset: u64,
        length: u64,
    ) -> Result<Option<u64>> {
        let (mut start, mut offset) = (start, offset);
        let length_now = usize::try_from(length).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(&self.file, Some(&mut start), target, Some(&mut offset), length_now) {
            Ok(0) => Err(self.ends_before(start.saturating_add(length))),
            Ok(copied) => Ok(Some(copied as u64)),
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => Ok(None),
            Err(Errno::INTR) => self.copy_to((target, target_path), start, offset, length),
            Err(errno) => {
                let doing = format!("cannot copy {} to", self.path.display());
                Err(Error::from_io(&doing, target_path, &errno.into()))
            }
        }
    }

    /// Refuses the file if it is not what it was when it was opened.
    ///
    /// # Errors
    /// Its size or its time of change is another, or the path now names another file.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|cause| Error::from_io("cannot look at", &self.path, &cause))?;
        let named =
            std::fs::metadata(&self.path).map_err(|cause| Error::from_io("cannot look at", &self.path, &cause))?;
        if State::of(&now) == self.state && State::of(&named) == self.state {
            return Ok(());
        }
        Err(Error::Checkpoint(format!("{}: the file changed while it was read; run again", self.path.display())))
    }

    /// Notes that these bytes will not be read again, so that they make room in the system's cache.
    pub fn forget(&self, offset: u64, length: u64) {
        let batch = self.used.lock().unwrap_or_else(PoisonError::into_inner).add(offset..offset.saturating_add(length));
        if let Some(range) = batch {
            // Only advice: where it cannot be given, nothing is lost.
            let length = NonZeroU64::new(range.end - range.start);
            let _ = rustix::fs::fadvise(&self.file, range.start, length, rustix::fs::Advice::DontNeed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn a_folder_and_a_pipe_are_refused_at_once() -> Outcome {
        let folder = tempfile::tempdir()?;
        assert!(matches!(Input::open(folder.path()), Err(Error::File(message)) if message.contains("no regular file")));
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
        assert!(matches!(Input::open(&pipe), Err(Error::File(message)) if message.contains("no regular file")));
        Ok(())
    }

    #[test]
    fn a_cut_file_is_an_error_not_a_signal() -> Outcome {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(&[7; 100])?;
        let input = Input::open(file.path())?;
        file.as_file().set_len(50)?;
        assert!(
            matches!(input.read_at(&mut [0; 10], 45), Err(Error::Checkpoint(message)) if message.contains("byte 55"))
        );
        assert!(input.check_unchanged().is_err());
        Ok(())
    }

    #[test]
    fn a_replaced_file_is_noticed() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a");
        std::fs::write(&path, [1])?;
        let input = Input::open(&path)?;
        input.check_unchanged()?;
        std::fs::write(folder.path().join("b"), [2])?;
        std::fs::rename(folder.path().join("b"), &path)?;
        assert!(matches!(input.check_unchanged(), Err(Error::Checkpoint(message)) if message.contains("changed")));
        Ok(())
    }
}
