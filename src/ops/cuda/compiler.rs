//! Kernels compiled by NVRTC, which is loaded when it is needed and need not be there.

use std::ffi::{CString, c_char, c_int};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use cudarc::nvrtc::{result, sys};

use super::Source;
use crate::torch_ext;
use crate::{Error, Fault, Result};

const PLACE: &str = "NVRTC";

/// NVRTC, found.
pub(super) struct Compiler {
    /// As in (13, 0).
    pub version: (i32, i32),
    /// What it compiles for, ascending: 90 is sm_90.
    architectures: Vec<i32>,
}

/// What a driver loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Machine code for just this architecture.
    Machine(i32),
    /// Assembly that the driver compiles on for a newer one.
    Assembly(i32),
}

impl Target {
    /// As NVRTC and file names spell it.
    pub fn name(self) -> String {
        match self {
            Self::Machine(architecture) => format!("sm_{architecture}"),
            Self::Assembly(architecture) => format!("compute_{architecture}"),
        }
    }
}

/// A compiled source.
pub(super) struct Compiled {
    /// Machine code, or assembly with a NUL behind it.
    pub image: Vec<u8>,
    /// What the compiler said.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests look for spilled registers in it"))]
    pub log: String,
}

impl Compiler {
    /// Loads NVRTC: the one that libtorch brings, else one that the system finds.
    ///
    /// # Errors
    /// It is nowhere, or cannot say what it is.
    pub fn find() -> Result<Self> {
        let folders = folders();
        preload(&folders);
        // SAFETY: loads a library by its name, whose initialisers are those of NVRTC.
        if !unsafe { sys::is_culib_present() } {
            let looked: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
            let looked = if looked.is_empty() { String::new() } else { format!("{} and ", looked.join(", ")) };
            let what = format!("there is no libnvrtc.so.13 in {looked}the system's library folders");
            return Err(Error::Device(Fault::new(PLACE, what).hint(
                "`pip install nvidia-cuda-nvrtc` brings it: name its folder nvidia/cu13/lib in LD_LIBRARY_PATH",
            )));
        }
        let (mut version, mut count) = ((0, 0), 0);
        // SAFETY: each call writes to as many places as it is given.
        unsafe {
            sys::nvrtcVersion(&mut version.0, &mut version.1).result().map_err(fault)?;
            sys::nvrtcGetNumSupportedArchs(&mut count).result().map_err(fault)?;
        }
        let mut architectures: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: as many places as the library has just asked for.
        unsafe { sys::nvrtcGetSupportedArchs(architectures.as_mut_ptr()).result().map_err(fault)? };
        architectures.sort_unstable();
        Ok(Self { version, architectures })
    }

    #[cfg(test)]
    pub fn for_tests(version: (i32, i32)) -> Self {
        Self { version, architectures: vec![80, 90, 120] }
    }

    /// What to compile to for a device's architecture.
    ///
    /// # Errors
    /// The device is older than what this NVRTC compiles for.
    pub fn target(&self, architecture: i32) -> Result<Target> {
        if self.architectures.contains(&architecture) {
            return Ok(Target::Machine(architecture));
        }
        let older = self.architectures.iter().rev().find(|known| **known < architecture);
        older.map(|older| Target::Assembly(*older)).ok_or_else(|| {
            let (major, minor) = self.version;
            fault(format!("NVRTC {major}.{minor} compiles for none of the device's generation, sm_{architecture}"))
        })
    }

    /// Compiles a source.
    ///
    /// # Errors
    /// What NVRTC says of it.
    pub fn compile(&self, source: &Source, target: Target, more: &[&str]) -> Result<Compiled> {
        let text = CString::new(source.text).expect("a source has no NUL in it");
        let name = CString::new(source.file).expect("a name has no NUL in it");
        let options: Vec<String> =
            options(source, target).into_iter().chain(more.iter().map(ToString::to_string)).collect();
        let program = result::create_program(&text, Some(&name)).map_err(fault)?;
        // SAFETY: `program` is made just above, of text and a name that outlive it, and destroyed once, below, after its last use.
        unsafe {
            let compiled = result::compile_program(program, &options);
            let log = result::get_program_log(program).map(|log| text_of(&log)).unwrap_or_default();
            let image = match compiled {
                Ok(()) => image(program, target).map_err(fault),
                Err(error) => Err(fault(format!("{}: {error}\n{}", source.file, log.trim()))),
            };
            let _ = result::destroy_program(program);
            image.map(|image| Compiled { image, log })
        }
    }
}

/// All that NVRTC is told of a source.
pub(super) fn options(source: &Source, target: Target) -> Vec<String> {
    let architecture = format!("--gpu-architecture={}", target.name());
    std::iter::once(architecture).chain(source.options.iter().map(ToString::to_string)).collect()
}

/// # Safety
/// `program` was compiled for `target`.
unsafe fn image(program: sys::nvrtcProgram, target: Target) -> Result<Vec<u8>, result::NvrtcError> {
    // SAFETY: by the caller's promise; the image has as many bytes as the library asks for.
    unsafe {
        if let Target::Assembly(_) = target {
            return Ok(result::get_ptx(program)?.iter().map(|character| *character as u8).collect());
        }
        let mut size = 0;
        sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut image = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast::<c_char>()).result()?;
        Ok(image)
    }
}

/// Where NVRTC lies beside the libtorch this program runs with: in the same folder, or in that of its Python package.
fn folders() -> Vec<PathBuf> {
    let Some(torch) = torch_ext::libtorch_folder() else { return Vec::new() };
    let packages = torch.ancestors().nth(2).map(|packages| packages.join("nvidia/cu13/lib"));
    std::iter::once(torch).chain(packages).collect()
}

/// Loads NVRTC, and the library that it loads by name itself, from a folder where they are in one: what is loaded is found by its name
/// wherever it lies.
fn preload(folders: &[PathBuf]) {
    let Some(folder) = folders.iter().find(|folder| folder.join("libnvrtc.so.13").exists()) else { return };
    let names = folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let builtins =
        names.filter(|path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"libnvrtc-builtins.so.")));
    for path in builtins.chain([folder.join("libnvrtc.so.13")]) {
        let path = CString::new(path.into_os_string().into_vec()).expect("a path that was read has no NUL in it");
        // SAFETY: a path with a NUL behind it; the library stays loaded. Where it does not load, nothing is changed.
        unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    }
}

fn text_of(characters: &[c_char]) -> String {
    let bytes: Vec<u8> = characters.iter().map(|character| *character as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn fault(what: impl std::fmt::Display) -> Error {
    Error::Device(Fault::new(PLACE, what))
}
