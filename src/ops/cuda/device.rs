//! A device's kernels: loaded into the context that libtorch computes in, once, and found by name.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::OnceLock;

use cudarc::driver::{result, sys};
use tch::Device;

use super::cache::Place;
use super::compiler::{Compiler, Target};
use super::{SOURCES, SUFFIXES, Source, THREADS};
use crate::torch_ext;
use crate::{Error, Fault, Result};

/// The most devices of a machine that have kernels.
const DEVICES: usize = 64;

static PREPARED: [OnceLock<Prepared>; DEVICES] = [const { OnceLock::new() }; DEVICES];

struct Prepared {
    /// The device's primary context, which libtorch computes in, too.
    context: sys::CUcontext,
    /// Compute capability, major and minor.
    capability: (i32, i32),
    /// Each kernel for the types of [`SUFFIXES`].
    kernels: HashMap<&'static str, [sys::CUfunction; SUFFIXES.len()]>,
}

// SAFETY: handles of the driver, which may be used from any thread; nothing changes them.
unsafe impl Send for Prepared {}
// SAFETY: likewise.
unsafe impl Sync for Prepared {}

/// Makes a device's kernels ready: compiled, or read from the cache under `folder`, and loaded. From then on operations on the device
/// use them. Of a device other than CUDA's, and the second time, nothing is done. `progress` is told files done and in all: compiling
/// takes some seconds, the first time.
///
/// # Errors
/// NVRTC or the driver is missing or refuses. Operations then stay what they are without: libtorch's own.
pub fn prepare(device: Device, folder: &Path, progress: &dyn Fn(u64, u64)) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    let slot =
        PREPARED.get(index).ok_or_else(|| fault(format!("device {index} is beyond the {DEVICES} that are served")))?;
    if slot.get().is_none() {
        // Of two threads that prepare at once one is late; what it loaded is the same.
        let _ = slot.set(Prepared::new(index, folder, progress)?);
    }
    Ok(())
}

pub(super) fn is_prepared(device: Device) -> bool {
    matches!(device, Device::Cuda(index) if PREPARED.get(index).is_some_and(|slot| slot.get().is_some()))
}

/// Whether a prepared device multiplies fp8 matrices.
pub(crate) fn multiplies_fp8(device: Device) -> bool {
    capability(device).is_some_and(|capability| capability >= (8, 9))
}

/// Whether a prepared device has tensor cores that FlashAttention-2 makes little of: those of Hopper and of Blackwell's data centres.
pub(crate) fn outruns_flash(device: Device) -> bool {
    capability(device).is_some_and(|(major, _)| (9..=10).contains(&major))
}

fn capability(device: Device) -> Option<(i32, i32)> {
    let Device::Cuda(index) = device else { return None };
    PREPARED.get(index).and_then(OnceLock::get).map(|prepared| prepared.capability)
}

impl Prepared {
    fn new(index: usize, folder: &Path, progress: &dyn Fn(u64, u64)) -> Result<Self> {
        // SAFETY: loads a library by its name, whose initialisers are those of the driver.
        if !unsafe { sys::is_culib_present() } {
            return Err(fault("there is no libcuda.so.1: the machine has no NVIDIA driver"));
        }
        let compiler = Compiler::find()?;
        result::init().map_err(refused("starting"))?;
        let device = result::device::get(index as i32).map_err(refused("finding the device"))?;
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        // SAFETY: the device is one that the driver has just named; the context is never given back, so it outlives its handles.
        let (context, major, minor) = unsafe {
            let attribute = |which| result::device::get_attribute(device, which).map_err(refused("asking the device"));
            let context = result::primary_ctx::retain(device).map_err(refused("opening the device's context"))?;
            (context, attribute(MAJOR)?, attribute(MINOR)?)
        };
        let target = compiler.target(10 * major + minor)?;
        let mut driver = 0;
        // SAFETY: one place to write to.
        unsafe { sys::cuDriverGetVersion(&mut driver).result().map_err(refused("asking the driver"))? };

        let _entered = Entered::into(context)?;
        let mut kernels = HashMap::new();
        for (done, source) in SOURCES.iter().enumerate() {
            progress(done as u64, SOURCES.len() as u64);
            let place = Place::of(folder, source, target, &compiler, driver);
            let module = module(source, target, &compiler, &place)?;
            for kernel in source.kernels {
                kernels.insert(*kernel, functions(module, kernel)?);
            }
        }
        Ok(Self { context, capability: (major, minor), kernels })
    }
}

/// Loads a source's image: from the cache, or compiled where it is not there or the driver does not take it.
fn module(source: &Source, target: Target, compiler: &Compiler, place: &Place) -> Result<sys::CUmodule> {
    // SAFETY: the image is what NVRTC made for this device, as the digest beside it proves, and outlives the call.
    if let Some(module) =
        place.read().and_then(|image| unsafe { result::module::load_data(image.as_ptr().cast()) }.ok())
    {
        return Ok(module);
    }
    let image = compiler.compile(source, target, &[])?.image;
    // SAFETY: as above.
    let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(refused("loading kernels"))?;
    place.write(&image);
    Ok(module)
}

/// A kernel for each type.
fn functions(module: sys::CUmodule, kernel: &str) -> Result<[sys::CUfunction; SUFFIXES.len()]> {
    let mut found = [std::ptr::null_mut(); SUFFIXES.len()];
    for (found, (_, suffix)) in found.iter_mut().zip(SUFFIXES) {
        let name = CString::new(format!("{kernel}_{suffix}")).expect("a name has no NUL in it");
        // SAFETY: the module was just loaded and is never unloaded.
        *found = unsafe { result::module::get_function(module, name) }.map_err(refused("finding a kernel"))?;
    }
    Ok(found)
}

/// Launches a kernel, for the type numbered so in [`SUFFIXES`], on libtorch's current stream of a prepared device.
///
/// # Safety
/// `places` point to what the kernel takes, and the memory behind is as large as it reads and writes.
pub(super) unsafe fn launch(
    index: usize,
    kernel: &str,
    kind: usize,
    blocks: u32,
    places: &mut [*mut c_void],
) -> Result<()> {
    let prepared = PREPARED[index].get().expect("asked whether it is prepared before");
    let function = prepared.kernels[kernel][kind];
    // The stream that stands for none belongs to whatever context is current.
    let _entered = Entered::into(prepared.context)?;
    let stream = torch_ext::cuda_stream(index)?;
    // SAFETY: function and stream are of the context just entered; the rest by the caller's promise.
    unsafe { result::launch_kernel(function, (blocks, 1, 1), (THREADS as u32, 1, 1), 0, stream.cast(), places) }
        .map_err(refused(kernel))
}

/// A context entered, and left again for the one before when dropped.
struct Entered {
    before: Option<sys::CUcontext>,
}

impl Entered {
    fn into(context: sys::CUcontext) -> Result<Self> {
        let current = result::ctx::get_current().map_err(refused("asking for the context"))?;
        if current == Some(context) {
            return Ok(Self { before: None });
        }
        // SAFETY: a context that was retained for good.
        unsafe { result::ctx::set_current(context) }.map_err(refused("entering the device's context"))?;
        Ok(Self { before: Some(current.unwrap_or(std::ptr::null_mut())) })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // SAFETY: what was current a moment ago, or null for none.
            let _ = unsafe { result::ctx::set_current(before) };
        }
    }
}

fn refused(doing: &str) -> impl Fn(result::DriverError) -> Error + use<'_> {
    move |error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        fault(format!("{doing}: the driver says {}", text.unwrap_or_else(|_| format!("{error:?}"))))
    }
}

fn fault(what: impl std::fmt::Display) -> Error {
    Error::Device(
        Fault::new("CUDA kernels", what).hint(
            "`nvidia-smi` says whether driver and device are well; the driver must be of the 580 series or newer",
        ),
    )
}
