//! How positions enter.

use crate::ops::RopeLayout;

/// How positions enter.
#[derive(Debug, Clone, PartialEq)]
pub enum Position {
    /// Rotary (arXiv:2104.09864).
    Rope(Rope),
    /// Biases linear in the distance (arXiv:2108.12409).
    Alibi {
        /// Of each head.
        slopes: Vec<f64>,
        /// Whether slopes and biases are rounded to bf16.
        rounded: bool,
        /// Biases are multiplied by this.
        scale: f64,
    },
    /// Not at all: the mask alone tells tokens apart.
    None,
}

impl Position {
    /// The length beyond which all tokens of a document, also its first ones, stand at other angles than in a shorter one.
    ///
    /// Dynamic scaling has other angles at every length: there, as in transformers, keys that are kept stay as they were.
    pub fn border(&self) -> Option<i64> {
        match self {
            Self::Rope(Rope { scaling: RopeScaling::LongRope { original, .. }, .. }) => Some(*original),
            Self::Rope(_) | Self::Alibi { .. } | Self::None => None,
        }
    }
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How many of a head's H elements rotate: the first ones, but the last ones in latent and compressed attention.
    pub rotated: i64,
    /// Which of them turn together.
    pub layout: RopeLayout,
    /// How it reaches beyond the length it was trained for.
    pub scaling: RopeScaling,
}

/// How rotary embedding reaches beyond the length it was trained for.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not.
    None,
    /// Positions are divided by the factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with documents longer than `original` (NTK-aware, by u/bloc97 and u/emozilla).
    Dynamic {
        /// The factor.
        factor: f64,
        /// Length the base was trained for, in tokens.
        original: i64,
    },
    /// YaRN (arXiv:2309.00071).
    Yarn {
        /// The factor.
        factor: f64,
        /// Length the base was trained for, in tokens.
        original: i64,
        /// Rotations above which a dimension is left alone.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated whole.
        beta_slow: f64,
        /// Cosines and sines are multiplied by this.
        attention_factor: f64,
        /// Whether the correction range is rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (arXiv:2402.13753): wavelengths stretched one by one, in documents longer than `original` by other factors.
    LongRope {
        /// Of documents of at most `original` tokens.
        short: Vec<f64>,
        /// Of longer ones.
        long: Vec<f64>,
        /// Length the base was trained for, in tokens.
        original: i64,
        /// Cosines and sines are multiplied by the first, in longer documents by the second.
        attention_factors: [f64; 2],
    },
    /// Only the first `turning` of all pairs of the head turn, in the wavelengths they would have if all did.
    Proportional {
        /// Pairs that turn.
        turning: i64,
        /// Positions are divided by it.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths divided, short ones kept, a ramp between.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Length the base was trained for, in tokens.
        original: i64,
        /// Rotations over `original` below which a wavelength is divided whole.
        low_freq_factor: f64,
        /// Rotations over `original` above which it is kept.
        high_freq_factor: f64,
    },
}
