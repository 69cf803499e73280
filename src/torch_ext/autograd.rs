//! Operations computed without a graph, with a backward written in Rust.

use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;

use super::failure::{expect, panic_text};
use super::{Raw, owned, raws};

type Backward = Box<dyn FnOnce(&[Tensor]) -> Vec<Option<Tensor>> + Send>;

unsafe extern "C" {
    fn engraft_custom(
        inputs: *const Raw,
        n_inputs: usize,
        outputs: *const Raw,
        n_outputs: usize,
        closure: *mut c_void,
        name: *const c_char,
    ) -> *mut c_char;
    fn engraft_gradients(
        outputs: *const Raw,
        grad_outputs: *const Raw,
        n_outputs: usize,
        inputs: *const Raw,
        n_inputs: usize,
        out: *mut Raw,
    ) -> *mut c_char;
}

/// Wires `outputs`, computed without a graph, to `inputs` by a backward written in Rust.
///
/// `backward` receives one gradient per output (zeros where the output was not used) and returns one per input, `None` where
/// there is none to give. It runs once, without a graph being recorded, possibly on libtorch's own thread (it is `Send`); a
/// panic in it becomes a libtorch error. When no input requires a gradient, or gradients are off, it is dropped at once and
/// the outputs are plain tensors.
///
/// A closure may keep the very tensors passed as `outputs`: what is returned are other handles to the same storage, so no
/// reference cycle arises.
pub fn custom(
    name: &'static CStr,
    inputs: &[&Tensor],
    outputs: Vec<Tensor>,
    backward: impl FnOnce(&[Tensor]) -> Vec<Option<Tensor>> + Send + 'static,
) -> Vec<Tensor> {
    if !records_graph(inputs) {
        return outputs;
    }
    let outputs: Vec<Tensor> = outputs.iter().map(Tensor::detach).collect();
    let closure: Box<Backward> = Box::new(Box::new(backward));
    let inputs = raws(inputs.iter().copied());
    let wired = raws(outputs.iter());
    // SAFETY: the pointers are of live tensors; the node takes ownership of the closure, which is given back exactly once to
    // `engraft_backward_call` or `engraft_backward_drop`.
    let error = unsafe {
        engraft_custom(
            inputs.as_ptr(),
            inputs.len(),
            wired.as_ptr(),
            wired.len(),
            Box::into_raw(closure).cast(),
            name.as_ptr(),
        )
    };
    expect(error);
    outputs
}

/// Whether an operation on `inputs` would be recorded: gradients are on and one of them requires one.
pub fn records_graph(inputs: &[&Tensor]) -> bool {
    // SAFETY: reads and writes back libtorch's thread-local flag.
    let enabled = unsafe {
        let before = torch_sys::at_grad_set_enabled(1);
        torch_sys::at_grad_set_enabled(before);
        before != 0
    };
    enabled && inputs.iter().any(|t| t.requires_grad())
}

/// The gradients of `outputs`, contracted with `grad_outputs`, with respect to `inputs`; `None` where an input was not used.
pub fn gradients(outputs: &[&Tensor], grad_outputs: &[&Tensor], inputs: &[&Tensor]) -> Vec<Option<Tensor>> {
    assert_eq!(outputs.len(), grad_outputs.len(), "one upstream gradient per output");
    let (outputs, grads) = (raws(outputs.iter().copied()), raws(grad_outputs.iter().copied()));
    let inputs = raws(inputs.iter().copied());
    let mut out = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: live tensors; `out` has room for one pointer per input.
    expect(unsafe {
        engraft_gradients(
            outputs.as_ptr(),
            grads.as_ptr(),
            outputs.len(),
            inputs.as_ptr(),
            inputs.len(),
            out.as_mut_ptr(),
        )
    });
    out.into_iter().map(owned).collect()
}

/// Calls the Rust half of a node. Consumes `closure` and the gradients.
#[unsafe(no_mangle)]
unsafe extern "C" fn engraft_backward_call(
    closure: *mut c_void,
    grads: *mut Raw,
    n_grads: usize,
    out: *mut Raw,
    n_out: usize,
) -> *mut c_char {
    // SAFETY: `closure` was made by `custom` and is handed over exactly once; `grads` are new tensors that become ours.
    let (backward, grads) = unsafe {
        let backward: Box<Backward> = Box::from_raw(closure.cast());
        let grads: Vec<Tensor> =
            std::slice::from_raw_parts(grads, n_grads).iter().map(|p| Tensor::from_ptr(*p)).collect();
        (backward, grads)
    };
    let result = catch_unwind(AssertUnwindSafe(|| {
        let results = backward(&grads);
        assert_eq!(results.len(), n_out, "a backward returns one gradient per input");
        results
    }));
    match result {
        Ok(results) => {
            for (i, gradient) in results.into_iter().enumerate() {
                if let Some(mut tensor) = gradient {
                    // SAFETY: `out` has room for `n_out` pointers; C++ takes the tensor over, so it is not dropped here.
                    unsafe { *out.add(i) = tensor.as_mut_ptr() };
                    std::mem::forget(tensor);
                }
            }
            std::ptr::null_mut()
        }
        Err(panic) => {
            let text = CString::new(panic_text(&*panic).replace('\0', " ")).unwrap_or_default();
            // SAFETY: C++ frees the copy with free().
            unsafe { libc::strdup(text.as_ptr()) }
        }
    }
}

/// Drops a backward that was never called.
#[unsafe(no_mangle)]
unsafe extern "C" fn engraft_backward_drop(closure: *mut c_void) {
    // SAFETY: as in `engraft_backward_call`.
    let backward: Box<Backward> = unsafe { Box::from_raw(closure.cast()) };
    // What a backward holds are tensors, whose drop does not panic; should one, it must not cross C++ frames.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(backward)));
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    fn square(x: &Tensor, counter: std::sync::Arc<()>) -> Tensor {
        let y = tch::no_grad(|| x * x);
        let saved = x.detach();
        custom(c"test::square", &[x], vec![y], move |grads| {
            let _alive = &counter;
            vec![Some(&grads[0] * &saved * 2.0)]
        })
        .remove(0)
    }

    #[test]
    fn a_rust_backward_gives_the_gradient_of_autograd() {
        let x = leaf(&[1.0, -2.0, 3.0]);
        let alive = std::sync::Arc::new(());
        (square(&x, alive.clone()) * Tensor::from_slice(&[1f32, 10.0, 100.0])).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [2.0, -40.0, 600.0]);
        assert_eq!(std::sync::Arc::strong_count(&alive), 1, "the closure is dropped after backward");
    }

    #[test]
    fn a_backward_that_is_never_called_is_dropped_with_its_graph() {
        let alive = std::sync::Arc::new(());
        let x = leaf(&[1.0]);
        let y = square(&x, alive.clone());
        assert_eq!(std::sync::Arc::strong_count(&alive), 2);
        drop(y);
        assert_eq!(std::sync::Arc::strong_count(&alive), 1);
        let _ = tch::no_grad(|| square(&x, alive.clone()));
        assert_eq!(std::sync::Arc::strong_count(&alive), 1, "without a graph it is dropped at once");
    }

    #[test]
    fn a_closure_that_keeps_an_output_makes_no_cycle() {
        let alive = std::sync::Arc::new(());
        let counter = alive.clone();
        let x = leaf(&[0.5]);
        let y = tch::no_grad(|| x.exp());
        let saved = y.shallow_clone();
        let y = custom(c"test::exp", &[&x], vec![y], move |grads| {
            let _alive = &counter;
            vec![Some(&grads[0] * &saved)]
        });
        drop(y);
        assert_eq!(std::sync::Arc::strong_count(&alive), 1);
    }

    #[test]
    fn a_panic_in_a_backward_becomes_a_libtorch_error() {
        let x = leaf(&[1.0]);
        let y = custom(c"test::panic", &[&x], vec![x.detach() * 1.0], |_| panic!("the reason"));
        let error = y[0].sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains("the reason") && error.contains("test::panic"), "{error}");
    }

    #[test]
    fn backward_twice_is_refused() {
        let x = leaf(&[1.0]);
        let y = square(&x, Default::default()).sum(Kind::Float);
        y.backward();
        assert!(y.f_backward().is_err());
    }
}
