//! Rotary position embedding: the frequencies by which query and key turn with the position.
//!
//! Formulas are those of transformers' `modeling_rope_utils.py`, including what it does with absent, null and zero
//! fields. Frequencies are computed in f64 and rounded once; transformers rounds at each step, which differs by less
//! than 2e-7 relative.

use std::f64::consts::PI;

use super::error::ModelError;
use super::fields::Fields;

/// How positions become angles, as the model's files declare it.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// What is done to reach beyond the trained length.
    pub scaling: RopeScaling,
}

/// How a model reaches beyond the length it was trained with.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every position is divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies are divided, high ones kept, those between blended (Llama 3.1).
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Turns within the trained length up to which a frequency is low.
        low_freq_factor: f64,
        /// Turns within the trained length from which a frequency is high.
        high_freq_factor: f64,
        /// The trained length in tokens.
        original_len: u32,
    },
    /// Each frequency is divided by a number of its own: what files other than `config.json` say instead of `Llama3`.
    Table {
        /// One per pair of elements.
        divisors: Vec<f32>,
    },
    /// Blend by the number of turns, and a sharper softmax (Peng et al., "YaRN", 2023).
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Multiplies cosine and sine, so that query times key grows by its square.
        attention_factor: f64,
        /// Turns from which a frequency is kept.
        beta_fast: f64,
        /// Turns up to which a frequency is divided.
        beta_slow: f64,
        /// Whether the blend starts and ends at whole dimensions.
        truncate: bool,
        /// The trained length in tokens.
        original_len: u32,
    },
}

impl RopeSpec {
    /// Reads both spellings: `rope_theta` beside `rope_scaling`, and everything in `rope_parameters`.
    pub(super) fn read(config: &Fields<'_>, max_positions: u32) -> Result<Self, ModelError> {
        let scaling = config.object("rope_scaling", "rope_scaling.")?.map_or_else(
            || config.object("rope_parameters", "rope_parameters."),
            |fields| Ok(Some(fields)),
        )?;
        let theta = match scaling.as_ref().map(|fields| fields.positive("rope_theta")).transpose()?.flatten()
        {
            Some(theta) => theta,
            None => config.positive("rope_theta")?.unwrap_or(DEFAULT_THETA),
        };
        for fields in scaling.iter().chain([config]) {
            if fields.number("partial_rotary_factor")?.is_some_and(|share| share != 1.0) {
                return Err(fields.unsupported("partial_rotary_factor", "1"));
            }
        }
        let scaling = match scaling {
            None => RopeScaling::None,
            Some(fields) => RopeScaling::read(config, &fields, max_positions)?,
        };
        Ok(Self { theta, scaling })
    }

    /// Radians per position for each pair of elements, fastest first: `head_size / 2` of them.
    pub fn inverse_frequencies(&self, head_size: usize) -> Vec<f32> {
        let pairs = head_size / 2;
        let plain = |pair: usize| self.theta.powf(-((2 * pair) as f64) / head_size as f64);
        (0..pairs).map(|pair| self.scaled(pair, plain(pair), head_size) as f32).collect()
    }

    /// Multiplies cosine and sine.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Longest sequence that the scaling is made for, when that is more than the model says itself.
    pub(super) fn stretched_len(&self) -> Option<u32> {
        match self.scaling {
            RopeScaling::Yarn { factor, original_len, .. } => Some((f64::from(original_len) * factor) as u32),
            _ => None,
        }
    }

    fn scaled(&self, pair: usize, plain: f64, head_size: usize) -> f64 {
        match self.scaling {
            RopeScaling::None => plain,
            RopeScaling::Table { ref divisors } => plain / f64::from(divisors[pair]),
            RopeScaling::Linear { factor } => plain / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                let turns = f64::from(original_len) * plain / (2.0 * PI);
                if turns < low_freq_factor {
                    plain / factor
                } else if high_freq_factor < turns {
                    plain
                } else {
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - kept) * plain / factor + kept * plain
                }
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_len, .. } => {
                let (low, high) = self.blend_range(
                    beta_fast,
                    beta_slow,
                    truncate,
                    f64::from(original_len),
                    head_size as f64,
                );
                let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain / factor * divided + plain * (1.0 - divided)
            }
        }
    }

    /// The pairs between which YaRN blends: those that make `beta_fast` and `beta_slow` turns in the trained length.
    fn blend_range(&self, fast: f64, slow: f64, truncate: bool, len: f64, head_size: f64) -> (f64, f64) {
        let pair_with = |turns: f64| head_size * (len / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (pair_with(fast), pair_with(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(head_size - 1.0));
        if low == high {
            high += 0.001; // A blend of no width would divide by zero.
        }
        (low, high)
    }
}

impl RopeScaling {
    fn read(config: &Fields<'_>, fields: &Fields<'_>, max_positions: u32) -> Result<Self, ModelError> {
        if let Some(nested) = fields.nested() {
            return Err(fields.unsupported(nested, "one set of parameters for all layers"));
        }
        let spelling = if fields.has("rope_type") { "rope_type" } else { "type" };
        let factor = || fields.required("factor", fields.positive("factor")?);
        match fields.text(spelling)?.unwrap_or("default") {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear { factor: factor()? }),
            "llama3" => {
                let (low, high) = (fields.positive("low_freq_factor")?, fields.positive("high_freq_factor")?);
                let low_freq_factor = fields.required("low_freq_factor", low)?;
                let high_freq_factor = fields.required("high_freq_factor", high)?;
                if high_freq_factor <= low_freq_factor {
                    return Err(fields.invalid("high_freq_factor", format!("above {low_freq_factor}")));
                }
                let original_len = original_len(config, fields, max_positions)?;
                Ok(Self::Llama3 { factor: factor()?, low_freq_factor, high_freq_factor, original_len })
            }
            "yarn" => Self::read_yarn(config, fields, max_positions),
            _ => Err(fields.unsupported(spelling, "default, linear, llama3, yarn")),
        }
    }

    fn read_yarn(config: &Fields<'_>, fields: &Fields<'_>, max_positions: u32) -> Result<Self, ModelError> {
        let original_len = original_len(config, fields, max_positions)?;
        let factor = match fields.positive("factor")? {
            Some(factor) => factor,
            // Null, but not absent, stands for the ratio of the two lengths.
            None if fields.has("factor") => f64::from(max_positions) / f64::from(original_len),
            None => fields.required("factor", None)?,
        };
        let nonzero = |name| Ok::<_, ModelError>(fields.number(name)?.filter(|number| *number != 0.0));
        let growth = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let attention_factor =
            match (fields.number("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
                (Some(attention_factor), _, _) => attention_factor,
                (None, Some(scale), Some(scale_all_dim)) => growth(scale) / growth(scale_all_dim),
                (None, _, _) => growth(1.0),
            };
        let beta_fast = nonzero("beta_fast")?.unwrap_or(DEFAULT_BETA_FAST);
        let beta_slow = nonzero("beta_slow")?.unwrap_or(DEFAULT_BETA_SLOW);
        let truncate = fields.flag("truncate")?.unwrap_or(true);
        Ok(Self::Yarn { factor, attention_factor, beta_fast, beta_slow, truncate, original_len })
    }
}

/// The trained length: beside the parameters it wins over inside them, and the model's limit stands in for both.
fn original_len(config: &Fields<'_>, fields: &Fields<'_>, max_positions: u32) -> Result<u32, ModelError> {
    let name = "original_max_position_embeddings";
    let outer = config.count(name)?;
    Ok(outer.or(fields.count(name)?).unwrap_or(max_positions))
}

const DEFAULT_THETA: f64 = 10_000.0;
const DEFAULT_BETA_FAST: f64 = 32.0;
const DEFAULT_BETA_SLOW: f64 = 1.0;
