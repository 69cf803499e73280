//! Compiled kernels on disk: one file for each source, target, compiler and driver, under a name made of them all.

use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::Source;
use super::compiler::{Compiler, Target, options};

/// Bytes of the digest that a file begins with.
const DIGEST: usize = 32;

/// Where a source's image is kept.
pub(super) struct Place {
    path: PathBuf,
}

impl Place {
    /// Under `folder`, for a driver of a version as CUDA counts them.
    pub fn of(folder: &Path, source: &Source, target: Target, compiler: &Compiler, driver: i32) -> Self {
        let mut key = Sha256::new();
        for part in [source.text, &options(source, target).join(" "), &format!("{:?} {driver}", compiler.version)] {
            key.update((part.len() as u64).to_le_bytes());
            key.update(part);
        }
        let key: String = key.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        let name = source.file.trim_end_matches(".cu");
        Self { path: folder.join("kernels").join(format!("{name}-{}-{key}", target.name())) }
    }

    /// The image, if it is there and whole.
    pub fn read(&self) -> Option<Vec<u8>> {
        let bytes = std::fs::read(&self.path).ok()?;
        let (digest, image) = bytes.split_at_checked(DIGEST)?;
        (Sha256::digest(image).as_slice() == digest).then(|| image.to_vec())
    }

    /// Keeps an image: written under a temporary name, then renamed, so that it is there whole or not at all. A cache that cannot be
    /// written costs the next start a few seconds, nothing else.
    pub fn write(&self, image: &[u8]) {
        let write = || -> std::io::Result<()> {
            let folder = self.path.parent().unwrap_or(Path::new("."));
            std::fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(&Sha256::digest(image))?;
            file.write_all(image)?;
            file.persist(&self.path)?;
            Ok(())
        };
        let _ = write();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::SOURCES;

    fn compiler(version: (i32, i32)) -> Compiler {
        Compiler::for_tests(version)
    }

    #[test]
    fn an_image_is_read_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::of(folder.path(), &SOURCES[0], Target::Machine(90), &compiler((13, 0)), 13000);
        assert!(place.read().is_none());
        place.write(b"machine code");
        assert_eq!(place.read().unwrap(), b"machine code");
        let kept: Vec<_> = std::fs::read_dir(folder.path().join("kernels")).unwrap().collect();
        assert_eq!(kept.len(), 1, "no temporary file is left: {kept:?}");

        let bytes = std::fs::read(&place.path).unwrap();
        let mut damaged = bytes.clone();
        *damaged.last_mut().unwrap() ^= 1;
        for wrong in [&damaged[..], &bytes[..bytes.len() - 1], &bytes[..DIGEST - 1], &[]] {
            std::fs::write(&place.path, wrong).unwrap();
            assert!(place.read().is_none(), "{} bytes", wrong.len());
        }
        place.write(b"made anew");
        assert_eq!(place.read().unwrap(), b"made anew");
    }

    #[test]
    fn another_source_target_compiler_or_driver_has_another_place() {
        let place = |source: usize, target, version, driver| {
            Place::of(Path::new("/c"), &SOURCES[source], target, &compiler(version), driver).path
        };
        let own = place(0, Target::Machine(90), (13, 0), 13000);
        assert_eq!(own, place(0, Target::Machine(90), (13, 0), 13000));
        let others = [
            place(1, Target::Machine(90), (13, 0), 13000),
            place(0, Target::Machine(80), (13, 0), 13000),
            place(0, Target::Assembly(90), (13, 0), 13000),
            place(0, Target::Machine(90), (12, 9), 13000),
            place(0, Target::Machine(90), (13, 0), 12090),
        ];
        assert!(others.iter().all(|other| *other != own), "{own:?} {others:?}");
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_no_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let place = Place::of(file.path(), &SOURCES[0], Target::Machine(90), &compiler((13, 0)), 13000);
        place.write(b"machine code");
        assert!(place.read().is_none());
    }
}
