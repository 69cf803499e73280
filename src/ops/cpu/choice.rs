//! Of many scores of each row the largest, in one pass over what they are made of.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::multiply_add;
use crate::torch_ext::{elements, filled};

/// Which columns of each row have the `chosen` largest `sum_i relu(products[l, i, w]) weights[l, i]` among the first `visible[l]`, all
/// of these where they are no more: (L, W), u8, of products (L, I, W) and weights (L, I), fp32. Of equal ones, the first.
pub(in crate::ops) fn largest(products: &Tensor, weights: &Tensor, visible: &[usize], chosen: usize) -> Tensor {
    let (rows, heads, columns) = products.size3().expect("(L, I, W)");
    let (products, weights) = (elements::<f32>(products), elements::<f32>(weights));
    let (heads, width) = (heads as usize, columns as usize);
    filled::<u8>(&[rows, columns], |range, out| {
        let [mut scores, mut order] = [(); 2].map(|()| vec![0f32; width]);
        for (row, out) in range.zip(out.chunks_exact_mut(width)) {
            let visible = visible[row].min(width);
            let (scores, order) = (&mut scores[..visible], &mut order[..visible]);
            out.fill(0);
            if visible <= chosen {
                out[..visible].fill(1);
                continue;
            }
            weighted_sum(&products[row * heads * width..][..heads * width], &weights[row * heads..][..heads], scores);
            order.copy_from_slice(scores);
            let (_, least, _) = order.select_nth_unstable_by(visible - chosen, f32::total_cmp);
            let mut equal = chosen - scores.iter().filter(|score| score.total_cmp(least).is_gt()).count();
            for (score, out) in scores.iter().zip(out) {
                let taken = score.total_cmp(least).is_gt() || (equal > 0 && score.total_cmp(least).is_eq());
                if taken && score.total_cmp(least).is_eq() {
                    equal -= 1;
                }
                *out = u8::from(taken);
            }
        }
    })
}

/// `sum_i relu(products_i) weights_i` of the first columns of each row.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn weighted_sum(products: &[f32], weights: &[f32], sums: &mut [f32]) {
    let (fused, width) = (target_cfg_f!(target_feature = "fma"), products.len() / weights.len());
    sums.fill(0.0);
    for (products, weight) in products.chunks_exact(width).zip(weights) {
        for (sum, product) in sums.iter_mut().zip(products) {
            *sum = multiply_add(fused, product.max(0.0), *weight, *sum);
        }
    }
}
