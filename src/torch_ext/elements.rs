//! The elements of tensors on the CPU, as slices.

use std::ops::Range;

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use super::parallel_for;

/// A Rust type that lies in memory as the elements of a kind of tensor (tch 0.24's own trait says `Half` of `bf16`).
pub trait Element: Copy + Send + Sync + 'static {
    /// The kind of tensor.
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}

impl Element for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

impl Element for f16 {
    const KIND: Kind = Kind::Half;
}

impl Element for u8 {
    const KIND: Kind = Kind::Uint8;
}

impl Element for i32 {
    const KIND: Kind = Kind::Int;
}

impl Element for i64 {
    const KIND: Kind = Kind::Int64;
}

/// The elements of a contiguous CPU tensor.
///
/// Panics when the tensor is elsewhere, not contiguous, or of another number type. The caller must not change the tensor in
/// place while the slice lives, as everywhere in libtorch.
pub fn elements<T: Element>(tensor: &Tensor) -> &[T] {
    assert!(tensor.device() == Device::Cpu && tensor.is_contiguous(), "elements of a contiguous CPU tensor");
    assert_eq!(tensor.kind(), T::KIND, "number type");
    if tensor.numel() == 0 {
        return &[];
    }
    // SAFETY: contiguous, on the CPU and of type T, so `numel` elements lie at `data_ptr`; alive as long as the tensor is.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// The elements of a contiguous CPU tensor, to be written; as [`elements`]. No one else may be reading the tensor.
pub fn elements_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    let length = elements::<T>(tensor).len();
    if length == 0 {
        return &mut [];
    }
    // SAFETY: as in `elements`, which has checked; the handle is borrowed exclusively.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), length) }
}

/// A new contiguous CPU tensor whose rows are written by `fill`, in parallel: it gets a range of rows and their elements.
///
/// A row is everything behind the first dimension. Every element must be written: the memory comes as it is.
pub fn filled<T: Element>(shape: &[i64], fill: impl Fn(Range<usize>, &mut [T]) + Sync) -> Tensor {
    let [tensor, _] = filled_pair::<T, f32>(shape, &[0], |rows, elements, _| fill(rows, elements));
    tensor
}

/// Two new tensors at once, as [`filled`]; they have equally many rows, or the second is empty.
pub fn filled_pair<T: Element, U: Element>(
    first: &[i64],
    second: &[i64],
    fill: impl Fn(Range<usize>, &mut [T], &mut [U]) + Sync,
) -> [Tensor; 2] {
    let ([first], second) =
        filled_beside([first], second, |rows, [first]: [&mut [T]; 1], second| fill(rows, first, second));
    [first, second]
}

/// N new tensors of one shape at once, as [`filled`].
pub fn filled_many<T: Element, const N: usize>(
    shape: &[i64],
    fill: impl Fn(Range<usize>, [&mut [T]; N]) + Sync,
) -> [Tensor; N] {
    filled_beside([shape; N], &[0], |rows, parts, _: &mut [f32]| fill(rows, parts)).0
}

/// [`filled_pair`] where a row takes as long as so many numbers, whatever its width.
pub fn filled_pair_worth<T: Element, U: Element>(
    first: &[i64],
    second: &[i64],
    row_numbers: usize,
    fill: impl Fn(Range<usize>, &mut [T], &mut [U]) + Sync,
) -> [Tensor; 2] {
    let ([first], second) =
        filled_worth([first], second, row_numbers, |rows, [first]: [&mut [T]; 1], second| fill(rows, first, second));
    [first, second]
}

/// N new tensors and one of another type at once, as [`filled`]; they have as many rows as the first, or are empty.
pub fn filled_beside<T: Element, U: Element, const N: usize>(
    shapes: [&[i64]; N],
    other: &[i64],
    fill: impl Fn(Range<usize>, [&mut [T]; N], &mut [U]) + Sync,
) -> ([Tensor; N], Tensor) {
    filled_worth(shapes, other, 0, fill)
}

fn filled_worth<T: Element, U: Element, const N: usize>(
    shapes: [&[i64]; N],
    other: &[i64],
    row_numbers: usize,
    fill: impl Fn(Range<usize>, [&mut [T]; N], &mut [U]) + Sync,
) -> ([Tensor; N], Tensor) {
    let (blanks, other) = (shapes.map(Blank::<T>::new), Blank::<U>::new(other));
    let rows = blanks[0].rows();
    assert!(blanks.iter().all(|blank| blank.is_empty() || blank.rows() == rows), "as many rows in all");
    assert!(other.is_empty() || other.rows() == rows, "as many rows in all");
    let width = blanks.iter().map(|blank| blank.width).sum::<usize>() + other.width;
    parallel_for(rows, (32_768 / width.max(row_numbers).max(1)).max(1), |range| {
        // SAFETY: `parallel_for` hands out every row once.
        let (parts, part) = unsafe { (blanks.each_ref().map(|blank| blank.part(&range)), other.part(&range)) };
        fill(range, parts, part);
    });
    (blanks.map(|blank| blank.tensor), other.tensor)
}

/// A new contiguous CPU tensor that several threads write, each its own rows.
struct Blank<T> {
    tensor: Tensor,
    /// Of `tensor`'s elements; not null unless it is empty.
    first: *mut T,
    /// Elements of a row.
    width: usize,
}

// SAFETY: the tensor is seen by no one else, and `part` is called for each row by one thread only.
unsafe impl<T: Send> Sync for Blank<T> {}

impl<T: Element> Blank<T> {
    fn new(shape: &[i64]) -> Self {
        let tensor = Tensor::empty(shape, (T::KIND, Device::Cpu));
        let first = tensor.data_ptr().cast();
        Self { tensor, first, width: shape[1..].iter().product::<i64>() as usize }
    }

    fn rows(&self) -> usize {
        self.tensor.size()[0] as usize
    }

    fn is_empty(&self) -> bool {
        self.tensor.numel() == 0
    }

    /// The elements of a range of rows; none of an empty tensor.
    ///
    /// # Safety
    /// No two slices that live at once overlap.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, rows: &Range<usize>) -> &mut [T] {
        if self.is_empty() {
            return &mut [];
        }
        assert!(rows.end <= self.rows());
        // SAFETY: within the tensor, as just asserted; not overlapping, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(rows.start * self.width), rows.len() * self.width) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_filled_with_what_is_meant_for_it() {
        // More elements than one thread takes at once.
        let [a, b] = filled_pair::<i64, f32>(&[3_000, 50], &[3_000, 2], |rows, a, b| {
            for (i, row) in rows.enumerate() {
                a[i * 50..(i + 1) * 50].fill(row as i64);
                b[i * 2..(i + 1) * 2].fill(-(row as f32));
            }
        });
        for row in 0..3_000 {
            assert!(elements::<i64>(&a)[row * 50..(row + 1) * 50].iter().all(|x| *x == row as i64), "row {row}");
            assert_eq!(elements::<f32>(&b)[row * 2..(row + 1) * 2], [-(row as f32); 2]);
        }
    }

    #[test]
    fn elements_are_written_in_place() {
        let mut tensor = Tensor::zeros([2, 2], (Kind::BFloat16, Device::Cpu));
        elements_mut::<bf16>(&mut tensor)[3] = bf16::from_f32(2.5);
        assert_eq!(tensor.double_value(&[1, 1]), 2.5);
        assert!(elements::<f32>(&Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))).is_empty());
    }

    #[test]
    #[should_panic(expected = "number type")]
    fn elements_of_another_number_type_are_refused() {
        let _ = elements::<f16>(&Tensor::zeros([1], (Kind::BFloat16, Device::Cpu)));
    }

    #[test]
    #[should_panic(expected = "contiguous")]
    fn elements_with_gaps_are_refused() {
        let _ = elements::<f32>(&Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).tr());
    }
}
