//! Copies between a GPU and the host that are made beside the work of both.

use std::ffi::{c_char, c_int, c_void};

use tch::{Device, Tensor};

use super::failure::expect;
use super::{Raw, owned, raw};

unsafe extern "C" {
    fn engraft_transfer(from: Raw, to_host: c_int, index: c_int, out: *mut Raw, event: *mut *mut c_void)
    -> *mut c_char;
    fn engraft_transfer_done(event: *mut c_void, index: c_int, this_thread: c_int) -> *mut c_char;
}

/// A copy under way, on a stream of its own. It begins when what was given to this thread's stream before is done.
///
/// Where there is no GPU, it is made at once, into another buffer.
pub struct Transfer {
    from: Tensor,
    to: Tensor,
    /// Marks its end, and the GPU it is of.
    end: Option<(*mut c_void, usize)>,
}

// SAFETY: an event is waited for and destroyed on whatever thread; tensors are Send.
unsafe impl Send for Transfer {}

impl Transfer {
    /// To pinned memory.
    pub fn to_host(from: Tensor) -> Self {
        match from.device() {
            Device::Cuda(index) => Self::begin(from, true, index),
            _ => Self { to: from.copy(), from, end: None },
        }
    }

    /// From pinned memory to `device`.
    pub fn to_device(from: Tensor, device: Device) -> Self {
        match device {
            Device::Cuda(index) => Self::begin(from, false, index),
            _ => Self { to: from.copy(), from, end: None },
        }
    }

    fn begin(from: Tensor, to_host: bool, index: usize) -> Self {
        let (mut out, mut event) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a live tensor, kept until the copy is made; both results are filled on success.
        expect(unsafe { engraft_transfer(raw(&from), to_host.into(), index as c_int, &mut out, &mut event) });
        Self { from, to: owned(out).expect("filled on success"), end: Some((event, index)) }
    }

    /// What is copied.
    pub fn source(&self) -> &Tensor {
        &self.from
    }

    /// Where it is copied to: not to be read before it has arrived.
    pub fn target(&self) -> &Tensor {
        &self.to
    }

    /// The copy: what is given to this thread's stream from here on waits for it, the thread does not.
    pub fn arrived(mut self) -> Tensor {
        expect(self.wait(false));
        self.to.shallow_clone()
    }

    /// The copy, when this thread has waited for it: to be read on the host.
    pub fn read(mut self) -> Tensor {
        expect(self.wait(true));
        self.to.shallow_clone()
    }

    fn wait(&mut self, this_thread: bool) -> *mut c_char {
        let Some((event, index)) = self.end.take() else { return std::ptr::null_mut() };
        // SAFETY: made by `engraft_transfer`, taken out and so handed back once.
        unsafe { engraft_transfer_done(event, index as c_int, this_thread.into()) }
    }
}

impl Drop for Transfer {
    /// Neither memory is used for something else before the copy is made.
    fn drop(&mut self) {
        // What fails here fails in whatever is computed next, too.
        drop(super::failure::message(self.wait(false)));
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn what_is_sent_away_comes_back() {
        let device = Device::cuda_if_available();
        let x = Tensor::arange(1000, (Kind::Float, device)) * 0.5;
        let away = Transfer::to_host(x.shallow_clone());
        assert_ne!(away.target().data_ptr(), x.data_ptr());
        assert_eq!((away.source().data_ptr(), away.target().device()), (x.data_ptr(), Device::Cpu));
        assert!(Transfer::to_host(x.shallow_clone()).read().equal(&x.to_device(Device::Cpu)));
        let back = Transfer::to_device(away.arrived(), device).arrived();
        assert!(back.device() == device && back.data_ptr() != x.data_ptr() && back.equal(&x));
    }
}
