//! A GPU's energy counter, by NVIDIA's management library, which is loaded where there is one: nothing of it is needed to build.
//!
//! Source: NVML API Reference Manual (`nvmlDeviceGetTotalEnergyConsumption`, of Volta and later; millijoules since the driver was
//! loaded).

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::ptr::null_mut;

/// What every function gives where it did what it should.
const SUCCESS: c_int = 0;

type Init = unsafe extern "C" fn() -> c_int;
type ByIndex = unsafe extern "C" fn(c_uint, *mut *mut c_void) -> c_int;
type ByName = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_int;
type Energy = unsafe extern "C" fn(*mut c_void, *mut c_ulonglong) -> c_int;

/// The counter of one GPU.
#[derive(Debug)]
pub struct GpuEnergy {
    device: *mut c_void,
    energy: Energy,
}

// SAFETY: NVML's functions may be called from any thread, and the handle is the library's own for as long as the process lives.
unsafe impl Send for GpuEnergy {}

impl GpuEnergy {
    /// The counter of CUDA's device `index`; `None` without the library, the GPU or its counter.
    ///
    /// `visible` is what `CUDA_VISIBLE_DEVICES` says: CUDA's numbers are places in that list.
    pub fn of(index: usize, visible: Option<&str>) -> Option<Self> {
        let listed = visible.map(|list| list.split(',').map(str::trim).nth(index).map(str::to_string));
        // SAFETY: the name ends in a zero byte.
        let library = unsafe { libc::dlopen(c"libnvidia-ml.so.1".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return None;
        }
        let function = |name: &CStr| {
            // SAFETY: `library` is one that was opened, and it is never closed.
            let found = unsafe { libc::dlsym(library, name.as_ptr()) };
            (!found.is_null()).then_some(found)
        };
        let init = function(c"nvmlInit_v2")?;
        let by_index = function(c"nvmlDeviceGetHandleByIndex_v2")?;
        let by_name = function(c"nvmlDeviceGetHandleByUUID")?;
        let energy = function(c"nvmlDeviceGetTotalEnergyConsumption")?;
        // SAFETY: these are the functions' types as the manual has them.
        let (init, by_index, by_name, energy) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Init>(init),
                std::mem::transmute::<*mut c_void, ByIndex>(by_index),
                std::mem::transmute::<*mut c_void, ByName>(by_name),
                std::mem::transmute::<*mut c_void, Energy>(energy),
            )
        };
        let mut device = null_mut();
        // SAFETY: the library is initialised before anything else is asked of it; `device` outlives the calls.
        let found = unsafe {
            if init() != SUCCESS {
                return None;
            }
            match listed {
                None => by_index(c_uint::try_from(index).ok()?, &raw mut device),
                Some(name) => {
                    let name = name?;
                    match name.parse::<c_uint>() {
                        Ok(number) => by_index(number, &raw mut device),
                        Err(_) => by_name(std::ffi::CString::new(name).ok()?.as_ptr(), &raw mut device),
                    }
                }
            }
        };
        let counter = Self { device, energy };
        (found == SUCCESS && counter.joules().is_some()).then_some(counter)
    }

    /// Joules since the driver was loaded.
    pub fn joules(&self) -> Option<f64> {
        let mut millijoules = 0;
        // SAFETY: `device` is a handle that the library gave; `millijoules` outlives the call.
        let found = unsafe { (self.energy)(self.device, &raw mut millijoules) };
        (found == SUCCESS).then_some(millijoules as f64 / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_there_is_no_gpu_there_is_no_counter() {
        // On a machine with one the counter runs forward.
        match GpuEnergy::of(0, None) {
            None => assert!(GpuEnergy::of(0, Some("GPU-none")).is_none()),
            Some(counter) => {
                let before = counter.joules().unwrap();
                assert!(before > 0.0 && counter.joules().unwrap() >= before);
            }
        }
        assert!(GpuEnergy::of(99, None).is_none() && GpuEnergy::of(1, Some("0")).is_none());
    }
}
