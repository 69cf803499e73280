//! A tile of rows at a time: what a block keeps is never there of more than one (tiled compute, arXiv:2506.13996).

use tch::{Tensor, no_grad};

use crate::torch_ext::{custom, gradients};

/// `residual + block(x)`, where every row of the (T, ...) result comes of that row of `x` (T, D) alone, so many rows at a time; the
/// block runs again in backward. `parameters` are the leaves inside that are trained, fp32.
///
/// The block is given the tile's number and its rows of `x` and of the residual, which it adds; it must compute the same both times. In
/// backward, where that changes no gradient, it is given no residual.
pub fn tiled(
    x: &Tensor,
    residual: Option<&Tensor>,
    parameters: &[&Tensor],
    rows: i64,
    block: impl Fn(usize, &Tensor, Option<&Tensor>) -> Tensor + Send + 'static,
) -> Tensor {
    let total = x.size()[0];
    let spans =
        move || (0..total).step_by(rows as usize).map(move |start| (start, rows.min(total - start))).enumerate();
    let (saved, wants_dx) = (x.detach(), x.requires_grad());
    let output = no_grad(|| {
        let mut output: Option<Tensor> = None;
        for (tile, (start, count)) in spans() {
            let residual = residual.map(|residual| residual.detach().narrow(0, start, count));
            let part = block(tile, &saved.narrow(0, start, count), residual.as_ref());
            let whole = output.get_or_insert_with(|| {
                let size: Vec<i64> = [total].into_iter().chain(part.size().into_iter().skip(1)).collect();
                Tensor::empty(size, (part.kind(), part.device()))
            });
            whole.narrow(0, start, count).copy_(&part);
        }
        output.expect("a micro-batch has tokens")
    });
    let leaves: Vec<Tensor> = parameters.iter().map(|leaf| leaf.shallow_clone()).collect();
    let has_residual = residual.is_some();
    let inputs: Vec<&Tensor> = [x].into_iter().chain(residual).chain(parameters.iter().copied()).collect();
    custom(c"engraft::tiled", &inputs, vec![output], move |grads| {
        let dx = wants_dx.then(|| saved.zeros_like());
        let mut sums: Vec<Option<Tensor>> = leaves.iter().map(|_| None).collect();
        for (tile, (start, count)) in spans() {
            let x = saved.narrow(0, start, count).detach().set_requires_grad(wants_dx);
            let y = tch::with_grad(|| block(tile, &x, None));
            let wanted: Vec<&Tensor> = wants_dx.then_some(&x).into_iter().chain(&leaves).collect();
            let mut found = gradients(&[&y], &[&grads[0].narrow(0, start, count)], &wanted).into_iter();
            if let Some(dx) = &dx
                && let Some(own) = found.next().flatten()
            {
                dx.narrow(0, start, count).copy_(&own);
            }
            // In the order of the tiles, so that the sums are the same each time.
            for (sum, own) in sums.iter_mut().zip(found) {
                *sum = match (sum.take(), own) {
                    (Some(sum), Some(own)) => Some(sum + own),
                    (sum, own) => sum.or(own),
                };
            }
        }
        [dx].into_iter().chain(has_residual.then(|| Some(grads[0].shallow_clone()))).chain(sums).collect()
    })
    .remove(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::ops::testing::{check, randn};

    fn block(x: &Tensor, w: &Tensor) -> Tensor {
        x.matmul(w).tanh()
    }

    #[test]
    fn equals_the_block_on_all_rows_at_once() {
        // Rows that fill the tiles, that do not, and fewer than one.
        for rows in [5, 4, 11, 64] {
            check(
                &[randn(&[11, 6], 1), randn(&[6, 3], 2), randn(&[11, 3], 3)],
                |_, x| {
                    let inside = x[1].shallow_clone();
                    let with = |residual| {
                        let inside = inside.shallow_clone();
                        tiled(&x[0], residual, &[&x[1]], rows, move |_, x, residual| {
                            let y = block(x, &inside);
                            residual.map_or_else(|| y.shallow_clone(), |residual| residual + &y)
                        })
                    };
                    vec![with(Some(&x[2])), with(None)]
                },
                |_, x| vec![block(&x[0], &x[1]) + &x[2], block(&x[0], &x[1])],
            );
        }
    }

    #[test]
    fn an_input_without_gradient_still_trains_what_is_inside() {
        let found = [2, 100].map(|rows| {
            let w = randn(&[6, 3], 2).set_requires_grad(true);
            let inside = w.shallow_clone();
            let y = tiled(&randn(&[7, 6], 1), None, &[&w], rows, move |_, x, _| block(x, &inside));
            y.square().sum(tch::Kind::Float).backward();
            w.grad()
        });
        assert!(found[0].allclose(&found[1], 1e-5, 1e-6, false));
    }

    #[test]
    fn every_tile_is_told_its_number_both_times() {
        let seen = std::sync::Arc::new(Mutex::new(Vec::new()));
        let note = seen.clone();
        let x = randn(&[5, 2], 1).set_requires_grad(true);
        let y = tiled(&x, None, &[], 2, move |tile, x, _| {
            note.lock().unwrap().push((tile, x.size()[0]));
            x * 2.0
        });
        y.sum(tch::Kind::Float).backward();
        let once = [(0, 2), (1, 2), (2, 1)];
        assert_eq!(*seen.lock().unwrap(), [once, once].concat());
    }
}
