//! Several copies of the stream: what each half of a block reads of them and writes to them, and what the head reads, with their
//! weights.

use tch::{Kind, Tensor};

use super::layer::Stream;
use super::load::Reader;
use super::spec::{self, StreamMap};
use crate::Result;
use crate::ops::streams::{self, Streams};
use crate::ops::{self, Norm};

/// M copies of the stream, as the decoder begins and ends with them.
#[derive(Debug)]
pub(super) struct Copies {
    count: i64,
    gather: Streams,
}

/// How a half of a block reads M copies and writes to them.
#[derive(Debug, Clone)]
pub(super) struct StreamMix {
    streams: Streams,
    norm: Norm,
}

impl Copies {
    pub(super) fn load(spec: &spec::Streams, read: &Reader<'_>) -> Result<Self> {
        let map = map(&spec.gather, &[spec.count], read)?;
        Ok(Self { count: spec.count, gather: Streams { map, floor: spec.floor, rounds: 0 } })
    }

    /// M copies (T, M, D) of the embedded tokens (T, D).
    pub(super) fn of(&self, embedded: &Tensor) -> Tensor {
        embedded.unsqueeze(1).expand([-1, self.count, -1], false).contiguous()
    }

    /// What the final norm reads (T, D) of the copies (T, M, D).
    pub(super) fn gather(&self, h: &Tensor) -> Tensor {
        self.gather.gather(h)
    }
}

impl StreamMix {
    pub(super) fn load(spec: &spec::StreamMix, read: &Reader<'_>) -> Result<Self> {
        let map = map(&spec.map, &[spec.count, spec.count, spec.count * spec.count], read)?;
        Ok(Self { streams: Streams { map, floor: spec.floor, rounds: spec.rounds }, norm: read.norm(&spec.norm)? })
    }

    /// The copies `h` (T, M, D) after `half`, which is given what it reads of them.
    pub(super) fn around(&self, h: &Tensor, half: impl FnOnce(Stream<'_>) -> Tensor) -> Tensor {
        let (x, spread, h) = self.streams.enter(h); // (T, D)
        let y = half(Stream { h: &x, x: self.norm.of(&x), residual: None });
        streams::spread(&h, &y, &spread)
    }
}

/// The map, each kind of its numbers, so many as `kinds` says, with the factor of that kind.
fn map(spec: &StreamMap, kinds: &[i64], read: &Reader<'_>) -> Result<ops::streams::StreamMap> {
    let scale = read.wide(&spec.scale)?; // one for each kind
    let each: Vec<Tensor> =
        (0..).zip(kinds).map(|(kind, count)| scale.narrow(0, kind, 1).expand([*count], false)).collect();
    Ok(ops::streams::StreamMap {
        function: read.wide(&spec.function)?,
        base: read.wide(&spec.base)?,
        scale: Tensor::cat(&each, 0).to_kind(Kind::Float),
        eps: spec.eps,
    })
}
