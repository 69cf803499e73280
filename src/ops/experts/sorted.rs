//! Tokens sorted by expert, so that every expert meets its own rows in one product, and back.
//!
//! On the CPU, kernels of one pass gather the rows and sum what comes back, and every expert's rows are filled up with zeros
//! to one of a few counts: libtorch compiles a product anew for each count of rows that it has not met, which takes longer than the
//! product itself. A row of zeros has no gradient and none is read.

use tch::{Device, Kind, Tensor};

use crate::ops::cpu::{self, rows as kernels};
use crate::quant::Weight;
use crate::torch_ext::elements;

/// Which row goes to which expert. S is the number of rows, at least T C.
pub(super) struct Sorted {
    order: Order,
    ranges: Ranges,
    /// E.
    count: i64,
    /// C.
    choices: i64,
}

enum Order {
    /// For libtorch; rows are not filled up.
    Tensors {
        /// The token of each row (S), i64.
        tokens: Tensor,
        /// The expert of each row (S), i64, ascending.
        experts: Tensor,
        /// Place in (T, C) of each row (S), i64.
        places: Tensor,
        /// Row of each place (T C), i64.
        rows: Tensor,
    },
    /// For the kernels; what is filled up has no token and no place.
    Lists {
        /// The token of each row (S).
        tokens: Vec<Option<u32>>,
        /// The expert of each row (S), ascending.
        experts: Vec<Option<u32>>,
        /// Place in (T, C) of each row (S).
        places: Vec<Option<u32>>,
        /// Row of each place (T C).
        rows: Vec<u32>,
    },
}

/// Where each expert's rows are.
enum Ranges {
    /// Ends of all experts' rows (E), i32, for grouped products.
    Ends(Tensor),
    /// (expert, first row, number of rows) of those that have any.
    Spans(Vec<(i64, i64, i64)>),
}

impl Sorted {
    /// Of tokens that go to `chosen` (T, C) of E experts, for products in a number type on a device.
    pub(super) fn new(chosen: &Tensor, experts: i64, options: (Kind, Device)) -> Self {
        let like = &Tensor::empty([experts], options);
        tch::no_grad(
            || if cpu::serves(&[like]) { Self::filled_up(chosen, like) } else { Self::by_libtorch(chosen, like) },
        )
    }

    fn filled_up(chosen: &Tensor, like: &Tensor) -> Self {
        let (count, choices) = (like.size()[0], chosen.size()[1]);
        let chosen = chosen.contiguous();
        let chosen = elements::<i64>(&chosen);
        let mut sizes = vec![0; count as usize];
        chosen.iter().for_each(|expert| sizes[*expert as usize] += 1);
        let (mut spans, mut experts) = (Vec::new(), Vec::new());
        let mut next: Vec<usize> = Vec::new(); // the row of each expert's next token
        for (expert, size) in (0u32..).zip(sizes) {
            let start = experts.len();
            next.push(start);
            experts.resize(start + filled_up(size), Some(expert));
            if size > 0 {
                spans.push((i64::from(expert), start as i64, filled_up(size) as i64));
            }
        }
        let (mut tokens, mut places, mut rows) = (vec![None; experts.len()], vec![None; experts.len()], Vec::new());
        // Rows of an expert keep the order of the tokens.
        for (place, expert) in (0u32..).zip(chosen) {
            let row = next[*expert as usize];
            next[*expert as usize] += 1;
            tokens[row] = Some(place / choices as u32);
            places[row] = Some(place);
            rows.push(row as u32);
        }
        Self { order: Order::Lists { tokens, experts, places, rows }, ranges: Ranges::Spans(spans), count, choices }
    }

    fn by_libtorch(chosen: &Tensor, like: &Tensor) -> Self {
        let (count, choices) = (like.size()[0], chosen.size()[1]);
        // Stable: rows of an expert keep the order of the tokens, so that sums do not depend on the sort.
        let (experts, places) = chosen.reshape([-1]).sort_stable(true, 0, false); // (S)
        let all = Tensor::arange(count, (Kind::Int64, experts.device()));
        let ends = all.searchsorted(&experts, true, true, "right", None::<Tensor>); // (E), i32: no wait for a GPU
        // Grouped products are for bf16; other types go expert by expert.
        let ranges = if like.device().is_cuda() && like.kind() == Kind::BFloat16 {
            Ranges::Ends(ends)
        } else {
            let ends = Vec::<i32>::try_from(ends.to_device(Device::Cpu)).expect("one dimension of i32");
            let mut start = 0;
            let spans = ends.into_iter().enumerate().map(|(expert, end)| {
                let size = i64::from(end) - start;
                start += size;
                (expert as i64, start - size, size)
            });
            Ranges::Spans(spans.filter(|(.., size)| *size > 0).collect())
        };
        let tokens = places.divide_scalar_mode(choices, "floor");
        let rows = places.argsort(0, false);
        Self { order: Order::Tensors { tokens, experts, places, rows }, ranges, count, choices }
    }

    /// Whether the kernels of one pass work on the rows.
    pub(super) fn by_kernels(&self) -> bool {
        matches!(self.order, Order::Lists { .. })
    }

    /// The tokens x (T, D) of all rows, times their weight of (T, C) where these are given: (S, D).
    pub(super) fn gathered(&self, x: &Tensor, weights: Option<&Tensor>) -> Tensor {
        match &self.order {
            Order::Lists { tokens, .. } => {
                let factors = weights.map(|weights| self.weights(weights));
                kernels::gathered(&x.contiguous(), tokens, factors.as_ref())
            }
            Order::Tensors { tokens, .. } => {
                let rows = x.index_select(0, tokens);
                weights.map_or_else(|| rows.shallow_clone(), |w| &rows * self.weights(w).to_kind(x.kind()))
            }
        }
    }

    /// What each expert has (E, n), for its rows: (S, n).
    pub(super) fn spread(&self, of_experts: &Tensor) -> Tensor {
        match &self.order {
            Order::Lists { experts, .. } => kernels::gathered(&of_experts.contiguous(), experts, None),
            Order::Tensors { experts, .. } => of_experts.index_select(0, experts),
        }
    }

    /// The router's weights (T, C) of each row: (S, 1), fp32; 0 of what is filled up.
    pub(super) fn weights(&self, weights: &Tensor) -> Tensor {
        match &self.order {
            Order::Lists { places, .. } => {
                let weights = weights.contiguous();
                let of_places = elements::<f32>(&weights);
                let of_rows: Vec<f32> =
                    places.iter().map(|place| place.map_or(0.0, |place| of_places[place as usize])).collect();
                Tensor::from_slice(&of_rows).unsqueeze(1)
            }
            Order::Tensors { places, .. } => weights.reshape([-1]).index_select(0, places).unsqueeze(1),
        }
    }

    /// The sum of each token's rows of (S, D), times their weight of (T, C) where these are given, and of the residual (T, D): (T, D).
    pub(super) fn summed(&self, rows: &Tensor, weights: Option<&Tensor>, residual: Option<&Tensor>) -> Tensor {
        match &self.order {
            Order::Lists { rows: of_places, .. } => {
                let (weights, residual) = (weights.map(Tensor::contiguous), residual.map(Tensor::contiguous));
                kernels::summed(rows, (of_places, self.choices), weights.as_ref(), residual.as_ref())
            }
            Order::Tensors { rows: of_places, .. } => {
                let width = rows.size()[1];
                let y = rows.index_select(0, of_places).view([-1, self.choices, width]); // (T, C, D)
                let y = weights.map_or_else(|| y.shallow_clone(), |w| &y * w.to_kind(y.kind()).unsqueeze(-1));
                let summed = y.sum_dim_intlist([1i64].as_slice(), false, rows.kind()); // (T, D)
                residual.map_or_else(|| summed.shallow_clone(), |residual| residual + &summed)
            }
        }
    }

    /// Numbers of rows (S, 1) where they came from: (T, C).
    pub(super) fn by_place(&self, of_rows: &Tensor) -> Tensor {
        let flat = match &self.order {
            Order::Lists { rows, .. } => {
                let of_rows = elements::<f32>(of_rows);
                Tensor::from_slice(&rows.iter().map(|row| of_rows[*row as usize]).collect::<Vec<_>>())
            }
            Order::Tensors { rows, .. } => of_rows.index_select(0, rows),
        };
        flat.view([-1, self.choices])
    }

    /// The products of rows (S, D) with their tokens x (T, D): (S, 1), fp32.
    pub(super) fn products_with_tokens(&self, rows: &Tensor, x: &Tensor) -> Tensor {
        match &self.order {
            Order::Lists { tokens, .. } => kernels::products(rows, &x.contiguous(), tokens),
            Order::Tensors { tokens, .. } => row_products(rows, &x.index_select(0, tokens)),
        }
    }

    /// The products of rows (S, n) with what their expert has (E, n): (S, 1), fp32.
    pub(super) fn products_with_experts(&self, rows: &Tensor, of_experts: &Tensor) -> Tensor {
        match &self.order {
            Order::Lists { experts, .. } => kernels::products(rows, &of_experts.contiguous(), experts),
            Order::Tensors { experts, .. } => row_products(rows, &of_experts.index_select(0, experts)),
        }
    }

    /// `rows_e W_e` for rows (S, in) and weights (E, in, out), added to `onto` (S, out) where it is given: (S, out).
    pub(super) fn products(&self, rows: &Tensor, weights: &Tensor, onto: Option<Tensor>) -> Tensor {
        let columns = weights.size()[2];
        self.products_with(rows, columns, onto, || weights.shallow_clone(), |expert| weights.select(0, expert))
    }

    /// [`Sorted::products`] with frozen weights (E, out, in), transposed where `forward`. Of quantised ones only those of experts that
    /// have rows are made whole, one at a time, where products go expert by expert.
    pub(super) fn frozen_products(
        &self,
        rows: &Tensor,
        weight: &Weight,
        forward: bool,
        onto: Option<Tensor>,
    ) -> Tensor {
        let size = weight.size();
        let turned = |weight: Tensor| if forward { weight.transpose(-2, -1) } else { weight };
        let columns = if forward { size[1] } else { size[2] };
        self.products_with(rows, columns, onto, || turned(weight.dense()), |expert| turned(weight.expert(expert)))
    }

    fn products_with(
        &self,
        rows: &Tensor,
        columns: i64,
        onto: Option<Tensor>,
        all: impl FnOnce() -> Tensor,
        of: impl Fn(i64) -> Tensor,
    ) -> Tensor {
        match &self.ranges {
            Ranges::Ends(ends) => {
                let products = rows.internal_grouped_mm(&all(), Some(ends), None, None);
                onto.map_or_else(|| products.shallow_clone(), |onto| onto + &products)
            }
            Ranges::Spans(spans) => {
                let fresh = onto.is_none();
                let output =
                    onto.unwrap_or_else(|| rows.new_empty([rows.size()[0], columns], (rows.kind(), rows.device())));
                for &(expert, start, size) in spans {
                    let (own, weight) = (rows.narrow(0, start, size), of(expert));
                    let mut place = output.narrow(0, start, size);
                    let _ = if fresh { own.mm_out(&place, &weight) } else { place.addmm_(&own, &weight) };
                }
                output
            }
        }
    }

    /// `left_e^T right_e` for rows left (S, m) and right (S, n): (E, m, n), zero where an expert has no row.
    pub(super) fn outer_products(&self, left: &Tensor, right: &Tensor) -> Tensor {
        match &self.ranges {
            Ranges::Ends(ends) => left.tr().internal_grouped_mm(right, Some(ends), None, None),
            Ranges::Spans(spans) => {
                let shape = [self.count, left.size()[1], right.size()[1]];
                let output = Tensor::zeros(shape, (left.kind(), left.device()));
                for &(expert, start, size) in spans {
                    let (left, right) = (left.narrow(0, start, size), right.narrow(0, start, size));
                    let _ = left.tr().mm_out(&output.select(0, expert), &right);
                }
                output
            }
        }
    }
}

/// The products of rows with rows: (S, 1), fp32.
pub(super) fn row_products(a: &Tensor, b: &Tensor) -> Tensor {
    (a * b).sum_dim_intlist([1i64].as_slice(), true, Kind::Float)
}

/// How many rows an expert with so many has after filling up: a multiple of 16, and of a thirty-second of the next power of two, so
/// that few counts occur and at most one row in sixteen of many is for nothing.
fn filled_up(rows: usize) -> usize {
    rows.next_multiple_of((rows.next_power_of_two() / 32).max(16))
}
