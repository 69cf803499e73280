//! The kernels on an emulated GPU (`emulator.h`), for tests: their own source, compiled by the C++ compiler that built engraft.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::ffi::{CString, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, Once};

use tch::Device;

use super::{SOURCES, SUFFIXES, Source};
use crate::ops::cpu::tests::SWITCHED_OFF;

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static LAUNCHED: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

/// The emulated kernels that this thread has launched since it asked last, by their full names.
pub(crate) fn launched() -> BTreeSet<String> {
    LAUNCHED.take()
}

/// Runs `body` with tensors on the CPU served by the CUDA kernels.
pub(crate) fn emulated<T>(body: impl FnOnce() -> T) -> T {
    ON.set(true);
    let result = body();
    ON.set(false);
    result
}

/// Runs `body` for the emulated GPU, which is the CPU, and for a real one where there is one; the kernels serve on both.
pub(crate) fn on_gpus(body: impl Fn(Device)) {
    emulated(|| body(Device::Cpu));
    match gpu() {
        Some(device) => body(device),
        None => {
            static SAID: Once = Once::new();
            SAID.call_once(|| eprintln!("no GPU on this machine: the CUDA kernels ran emulated only"));
        }
    }
}

/// The first GPU, with kernels that are compiled anew; nothing on a machine without one.
pub(crate) fn gpu() -> Option<Device> {
    let device = Device::Cuda(0);
    tch::Cuda::is_available().then(|| {
        let folder = tempfile::tempdir().unwrap();
        super::prepare(device, folder.path(), &|_, _| ()).unwrap();
        device
    })
}

/// Runs `body` without the CUDA kernels, within [`on_gpus`].
pub(crate) fn plainly<T>(body: impl FnOnce() -> T) -> T {
    let (on, off) = (ON.replace(false), SWITCHED_OFF.replace(true));
    let result = body();
    ON.set(on);
    SWITCHED_OFF.set(off);
    result
}

/// Whether kernels serve a device, where tests decide that.
pub(super) fn decides(device: Device) -> Option<bool> {
    match device {
        Device::Cpu => Some(ON.get()),
        _ => SWITCHED_OFF.get().then_some(false),
    }
}

type Run = unsafe extern "C" fn(c_uint, c_uint, *mut *mut c_void, *const usize, usize);

/// Runs a kernel by its full name. One at a time: the emulator has one GPU.
pub(super) fn run(kernel: &str, blocks: u32, places: &mut [*mut c_void], sizes: &[usize]) {
    LAUNCHED.with_borrow_mut(|launched| launched.insert(kernel.to_string()));
    static COMPILED: Mutex<Option<HashMap<String, Run>>> = Mutex::new(None);
    // A test that failed while it held the lock left the table as it was.
    let mut compiled = COMPILED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let table = compiled.get_or_insert_default();
    if !table.contains_key(kernel) {
        let holds = |source: &&Source| names(source).any(|name| name == kernel);
        compile(SOURCES.iter().find(holds).expect("a kernel of some source"), table);
    }
    // SAFETY: the emulator compares number and sizes of the arguments with what the kernel takes before it reads them.
    unsafe { table[kernel](blocks, super::THREADS as u32, places.as_mut_ptr(), sizes.as_ptr(), places.len()) };
}

pub(super) fn names(source: &Source) -> impl Iterator<Item = String> + '_ {
    source.kernels.iter().flat_map(|kernel| SUFFIXES.map(|(_, suffix)| format!("{kernel}_{suffix}")))
}

fn compile(source: &Source, table: &mut HashMap<String, Run>) {
    let folder = tempfile::tempdir().unwrap();
    let (text, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
    let runs: String = names(source)
        .map(|name| {
            format!(
                "extern \"C\" void run_{name}(unsigned blocks, unsigned threads, void** places, const size_t* sizes, size_t given) {{\n  \
                 emulate({name}, blocks, threads, places, sizes, given);\n}}\n"
            )
        })
        .collect();
    std::fs::write(&text, format!("{}\n{}\n{runs}", include_str!("emulator.h"), source.text)).unwrap();
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let output = Command::new(compiler)
        .args([
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
            "-U_FORTIFY_SOURCE",
            "-w",
            "-o",
        ])
        .args([&library, &text])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}: {}", source.file, String::from_utf8_lossy(&output.stderr));
    load(&library, source, table);
}

fn load(library: &Path, source: &Source, table: &mut HashMap<String, Run>) {
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: a library that was just made; it stays loaded, so its functions stay what they are. Each has the type of `Run`.
    unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!handle.is_null(), "{}: {:?}", source.file, std::ffi::CStr::from_ptr(libc::dlerror()));
        for name in names(source) {
            let symbol = CString::new(format!("run_{name}")).unwrap();
            let found = libc::dlsym(handle, symbol.as_ptr());
            assert!(!found.is_null(), "{name}");
            table.insert(name, std::mem::transmute::<*mut c_void, Run>(found));
        }
    }
}
