//! Several copies of the stream side by side: hyper-connections (arXiv:2409.19606) whose mixing is kept doubly stochastic
//! (arXiv:2512.24880).

use super::NormSpec;

/// M copies of the stream, all of them the embedded tokens at first; and how they become one before the final norm:
/// `sum_m g_m h_m` with `g = sigmoid(f) + floor`, f the M numbers of the map.
#[derive(Debug, Clone, PartialEq)]
pub struct Streams {
    /// M.
    pub count: i64,
    /// From the copies to f.
    pub gather: StreamMap,
    /// Added to each weight.
    pub floor: f64,
}

/// From the M copies of a token, normed together without a weight, to numbers: `scale * (function normed) + base`, all in fp32.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamMap {
    /// Tensor name of (numbers, M D).
    pub function: String,
    /// Tensor name of (numbers).
    pub base: String,
    /// Tensor name of one factor for each kind of number.
    pub scale: String,
    /// Added to the mean square.
    pub eps: f64,
}

/// How a half of a block reads M copies of the stream and writes to them. Its map gives M + M + M M numbers a, b, c:
///
/// ```text
/// reads   x = norm(sum_m (sigmoid(a_m) + floor) h_m)
/// writes  h'_m = 2 sigmoid(b_m) half(x) + sum_k C[k, m] h_k
/// ```
///
/// C is the softmax of the rows of c, plus the floor, whose columns, rows, columns, ... are then divided by their sum plus the
/// floor, columns `rounds` times and rows once less.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamMix {
    /// M.
    pub count: i64,
    /// To a, b and c.
    pub map: StreamMap,
    /// Added where it says so above.
    pub floor: f64,
    /// How often columns are normalised.
    pub rounds: i64,
    /// Of what the half reads.
    pub norm: NormSpec,
}
