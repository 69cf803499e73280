//! When libtorch fails: its messages as errors and panics, and its panics as errors.

use std::any::Any;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Fault, Result};

/// Runs `body` and turns a libtorch failure (tch panics) into an error; running out of memory comes with advice.
pub fn catching<T>(place: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic_text(&*panic);
            if text.contains("out of memory")
                || text.contains("can't allocate memory")
                || text.contains("DefaultCPUAllocator")
            {
                return Err(Error::Device(Fault::new(place, reason(&text)).hint(
                    "training takes less with a lower training.micro_batch_size (and gradient_accumulation_steps raised by the same factor), \
                     training.recompute: full, a lower dataset.max_length or a lower adapter.r; everything does with a smaller base or dtype",
                )));
            }
            if let Some((before, _)) = text.split_once(" does not have a deterministic implementation") {
                let operation =
                    before.rsplit(|sign: char| !sign.is_alphanumeric() && sign != '_').next().unwrap_or(before);
                let what = format!("{operation} cannot be computed in one order on this device");
                let hint = "leave training.deterministic out, or train on the CPU, where every run is deterministic";
                return Err(Error::Device(Fault::new(place, what).hint(hint)));
            }
            std::panic::resume_unwind(panic)
        }
    }
}

/// What libtorch's text says of memory, without the stack it adds. tch shows its errors with line ends spelled out.
fn reason(text: &str) -> &str {
    let lines = text.lines().flat_map(|line| line.split("\\n"));
    lines.map(str::trim).find(|line| line.contains("memory")).unwrap_or("out of memory")
}

pub(super) fn checked(error: *mut c_char) -> Result<()> {
    match message(error) {
        None => Ok(()),
        Some(text) => Err(Error::Device(Fault::new("libtorch", text))),
    }
}

/// Panics as tch's own operations do: these calls fail only on a broken invariant or out of memory (see [`catching`]).
pub(super) fn expect(error: *mut c_char) {
    if let Some(text) = message(error) {
        panic!("{text}");
    }
}

pub(super) fn message(error: *mut c_char) -> Option<String> {
    if error.is_null() {
        return None;
    }
    // SAFETY: a malloc'd, NUL-terminated message, ours to free.
    unsafe {
        let text = CStr::from_ptr(error).to_string_lossy().into_owned();
        libc::free(error.cast());
        Some(text)
    }
}

pub(super) fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "panic without a message".into())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn what_has_no_order_is_an_error_where_one_is_asked_for() {
        use crate::torch_ext::{deterministic, set_deterministic};
        let put = || {
            let (mut to, at) = (Tensor::zeros([4], (Kind::Float, Device::Cpu)), Tensor::from_slice(&[1i64, 1]));
            catching("a place", || Ok(to.put_(&at, &Tensor::from_slice(&[1f32, 2.0]), false))).map(drop)
        };
        put().unwrap();
        set_deterministic(true);
        let (on, refused) = (deterministic(), put());
        set_deterministic(false);
        let error = refused.unwrap_err();
        assert!(on && !deterministic());
        assert_eq!(error.exit_code(), 8);
        let text = error.to_string();
        assert!(text.starts_with("a place: put_") && text.contains("training.deterministic"), "{text}");
        assert_eq!(std::env::var("CUBLAS_WORKSPACE_CONFIG").as_deref(), Ok(":4096:8"));
    }

    #[test]
    fn running_out_of_memory_is_one_line_without_libtorchs_stack() {
        let taken = catching("a place", || Ok(Tensor::zeros([1 << 50], (Kind::Float, Device::Cpu))));
        let error = taken.unwrap_err();
        assert_eq!(error.exit_code(), 8);
        let text = error.to_string();
        assert!(text.starts_with("a place: ") && text.contains("memory") && text.contains("adapter.r"), "{text}");
        assert!(text.len() < 800 && !text.contains("frame #"), "{text}");
    }
}
