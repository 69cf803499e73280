//! What backward needs waits in the host's memory: copied away while forward goes on, and back one block ahead of backward, so that
//! the GPU need not wait for either. Of what waits, two blocks' worth is on the GPU at a time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Device, Tensor};

use crate::torch_ext::Transfer;

/// How many tensors are on the GPU at a time: one that is read or copied, and the next.
pub const BUFFERS: usize = 2;

/// Where tensors of one forward wait for its backward, which asks for them in the opposite order.
#[derive(Clone, Default)]
pub struct Offload(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    /// By number; none once it is on its way back.
    on_host: Vec<Option<Tensor>>,
    /// On their way to the host, and still here.
    leaving: VecDeque<(usize, Transfer)>,
    /// On its way back.
    coming: Option<(usize, Transfer)>,
}

/// A tensor that waits.
pub(super) struct Away {
    offload: Offload,
    number: usize,
    device: Device,
}

impl Offload {
    /// Sends a tensor away.
    pub(super) fn put(&self, tensor: &Tensor) -> Away {
        let mut waiting = self.waiting();
        while waiting.leaving.len() >= BUFFERS {
            // Its place here is free once the copy is made; had that not been, the GPU waits here, not the host.
            drop(waiting.leaving.pop_front());
        }
        let number = waiting.on_host.len();
        let transfer = Transfer::to_host(tensor.detach());
        waiting.on_host.push(Some(transfer.target().shallow_clone()));
        waiting.leaving.push_back((number, transfer));
        Away { offload: self.clone(), number, device: tensor.device() }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Away {
    /// The tensor; that before it, which will be asked for next, sets out.
    pub(super) fn back(self) -> Tensor {
        let Self { offload, number, device } = self;
        let mut waiting = offload.waiting();
        let tensor = waiting.take(number, device);
        if let Some(next) = number.checked_sub(1)
            && waiting.coming.is_none()
            && waiting.leaving.iter().all(|(leaving, _)| *leaving != next)
            && let Some(on_host) = waiting.on_host[next].take()
        {
            waiting.coming = Some((next, Transfer::to_device(on_host, device)));
        }
        tensor
    }
}

impl Waiting {
    fn take(&mut self, number: usize, device: Device) -> Tensor {
        if let Some(place) = self.leaving.iter().position(|(leaving, _)| *leaving == number)
            && let Some((_, transfer)) = self.leaving.remove(place)
        {
            self.on_host[number] = None;
            return transfer.source().shallow_clone();
        }
        if let Some((_, transfer)) = self.coming.take_if(|(coming, _)| *coming == number) {
            return transfer.arrived();
        }
        let on_host = self.on_host[number].take().expect("what waits is asked for once");
        Transfer::to_device(on_host, device).arrived()
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::ops::recompute;
    use crate::ops::testing::randn;

    fn here(offload: &Offload) -> usize {
        let waiting = offload.waiting();
        waiting.leaving.len() + usize::from(waiting.coming.is_some())
    }

    #[test]
    fn all_come_back_as_they_were_and_no_more_than_two_are_here() {
        let device = Device::cuda_if_available();
        let offload = Offload::default();
        let tensors: Vec<Tensor> = (0..7).map(|i| randn(&[3, 4], i).to_device(device)).collect();
        let away: Vec<Away> = tensors
            .iter()
            .map(|tensor| {
                let away = offload.put(tensor);
                assert!(here(&offload) <= BUFFERS);
                away
            })
            .collect();
        for (number, away) in away.into_iter().enumerate().rev() {
            let back = away.back();
            assert!(back.equal(&tensors[number]), "{number}");
            // The last two had not left; the others were copies.
            assert_eq!(back.data_ptr() == tensors[number].data_ptr(), number >= 5, "{number}");
            assert!(here(&offload) < BUFFERS, "{number}");
        }
        assert!(offload.waiting().on_host.iter().all(Option::is_none));
    }

    #[test]
    fn in_any_other_order_they_come_back_as_well() {
        let offload = Offload::default();
        let tensors: Vec<Tensor> = (0..5).map(|i| randn(&[2], i)).collect();
        let mut away: Vec<Option<Away>> = tensors.iter().map(|tensor| Some(offload.put(tensor))).collect();
        for number in [2, 4, 0, 1, 3] {
            assert!(away[number].take().unwrap().back().equal(&tensors[number]));
        }
    }

    #[test]
    fn a_chain_of_recomputed_blocks_gives_the_same_bits() {
        let of = |offload: Option<&Offload>| {
            let w = randn(&[6, 6], 2).set_requires_grad(true);
            let x = randn(&[5, 6], 1).set_requires_grad(true);
            let mut h = x.shallow_clone();
            for _ in 0..6 {
                let inside = w.shallow_clone();
                h = recompute(&[&h], &[&w], offload, move |x| vec![x[0].matmul(&inside).tanh() + &x[0]]).remove(0);
            }
            h.square().sum(Kind::Float).backward();
            (x.grad(), w.grad())
        };
        let offload = Offload::default();
        let (found, expected) = (of(Some(&offload)), of(None));
        assert!(found.0.equal(&expected.0) && found.1.equal(&expected.1));
        assert_eq!(offload.waiting().on_host.len(), 6);
        assert!(offload.waiting().on_host.iter().all(Option::is_none) && here(&offload) == 0);
    }

    #[test]
    fn without_a_graph_nothing_is_sent_away() {
        let offload = Offload::default();
        recompute(&[&randn(&[2, 2], 1)], &[], Some(&offload), |x| vec![&x[0] * 2.0]);
        assert!(offload.waiting().on_host.is_empty());
    }
}
