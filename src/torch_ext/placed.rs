//! From the CPU to a GPU without waiting.

use std::ffi::{c_char, c_int};

use tch::{Device, Tensor};

use super::failure::{checked, expect};
use super::{Raw, owned, raw};
use crate::error::Result;

unsafe extern "C" {
    fn engraft_pinned(tensor: Raw, out: *mut Raw) -> *mut c_char;
    fn engraft_placed(tensor: Raw, index: c_int, out: *mut Raw) -> *mut c_char;
}

/// A copy of a CPU tensor in pinned memory, which a GPU reads by itself.
///
/// # Errors
/// Where there is no GPU, or the system has no more memory to pin.
pub fn pinned(tensor: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor; `out` is filled on success.
    checked(unsafe { engraft_pinned(raw(tensor), &mut out) })?;
    Ok(owned(out).expect("filled on success"))
}

/// The tensor on `device`. A pinned one is copied by the GPU while this thread goes on, in the order of the work that it gives to it.
pub fn placed(tensor: &Tensor, device: Device) -> Tensor {
    let Device::Cuda(index) = device else { return tensor.to_device(device) };
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor; `out` is filled on success. The pinned memory is not used again before the copy is made, whoever
    // drops it: libtorch's allocator sees to that.
    expect(unsafe { engraft_placed(raw(tensor), index as c_int, &mut out) });
    owned(out).expect("filled on success")
}

/// What was just made on the CPU, on `device`, as [`placed`] from pinned memory where that is a GPU.
pub fn sent(tensor: &Tensor, device: Device) -> Tensor {
    match device {
        Device::Cuda(_) => placed(&pinned(tensor).unwrap_or_else(|_| tensor.shallow_clone()), device),
        _ => tensor.to_device(device),
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn on_the_cpu_a_tensor_stays_where_it_is() {
        let x = Tensor::arange(5, (Kind::Int64, Device::Cpu));
        for there in [placed(&x, Device::Cpu), sent(&x, Device::Cpu)] {
            assert_eq!(there.data_ptr(), x.data_ptr());
        }
    }

    #[test]
    fn without_a_gpu_pinning_is_an_error_with_one_the_numbers_arrive() {
        let x = Tensor::arange(5, (Kind::Int64, Device::Cpu));
        match tch::Cuda::is_available() {
            false => assert_eq!(pinned(&x).unwrap_err().exit_code(), 8),
            true => {
                let there = placed(&pinned(&x).unwrap(), Device::Cuda(0));
                assert!(there.device().is_cuda() && there.to_device(Device::Cpu).equal(&x));
            }
        }
    }
}
