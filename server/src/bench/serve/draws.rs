//! Random numbers for prompts and arrivals: the same seed gives the same numbers in every version of the program.

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
#[derive(Clone, Debug)]
pub(super) struct Draws(u64);

impl Draws {
    /// The numbers of `seed` for one `purpose`: those of another purpose have nothing to do with them.
    pub(super) const fn new(seed: u64, purpose: u64) -> Self {
        Self(mixed(seed ^ mixed(purpose.wrapping_add(GAMMA))))
    }

    pub(super) const fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mixed(self.0)
    }

    /// Evenly from 0 up to, but not, 1.
    pub(super) const fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Evenly from 0 up to, but not, `end`.
    ///
    /// # Panics
    ///
    /// When `end` is zero: there is nothing to choose from.
    pub(super) fn below(&mut self, end: usize) -> usize {
        assert!(0 < end, "something to choose from");
        // The high half of the product; with ends far below 2^64 its bias cannot be seen.
        ((u128::from(self.bits()) * end as u128) >> 64) as usize
    }

    /// Normally distributed around 0 with variance 1 (Box and Muller, 1958).
    pub(super) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Gamma distributed with this shape and mean 1 (Marsaglia and Tsang, "A simple method for generating gamma
    /// variables", 2000).
    pub(super) fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let boost = (1.0 - self.unit()).powf(1.0 / shape);
            return self.gamma_from_one(shape + 1.0) * boost / shape;
        }
        self.gamma_from_one(shape) / shape
    }

    /// With mean `shape`, which is at least 1.
    fn gamma_from_one(&mut self, shape: f64) -> f64 {
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if 0.0 < v && (1.0 - self.unit()).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }
}

const fn mixed(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(mut draw: impl FnMut() -> f64) -> (f64, f64) {
        let drawn: Vec<f64> = (0..200_000).map(|_| draw()).collect();
        let mean = drawn.iter().sum::<f64>() / drawn.len() as f64;
        let variance = drawn.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / drawn.len() as f64;
        (mean, variance)
    }

    #[test]
    fn distributions_have_their_moments() {
        // The seeds are fixed, so a test that passes once passes always.
        let mut draws = Draws::new(1, 2);
        let (mean, variance) = moments(|| draws.normal());
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "normal: {mean}, {variance}");
        for shape in [0.25, 1.0, 4.0] {
            let mut draws = Draws::new(3, 4);
            let (mean, variance) = moments(|| draws.gamma(shape));
            assert!((mean - 1.0).abs() < 0.02, "gamma {shape}: mean {mean}");
            assert!((variance * shape - 1.0).abs() < 0.05, "gamma {shape}: variance {variance}");
        }
    }

    #[test]
    fn purposes_and_seeds_are_apart_and_repeat() {
        let first = |seed, purpose| Draws::new(seed, purpose).bits();
        assert_eq!(first(1, 2), first(1, 2));
        let all = [first(0, 0), first(0, 1), first(1, 0), first(1, 1)];
        assert!(all.iter().enumerate().all(|(at, one)| !all[..at].contains(one)), "{all:?}");
        let mut draws = Draws::new(5, 6);
        let mut seen = [false; 7];
        (0..200).for_each(|_| seen[draws.below(7)] = true);
        assert_eq!(seen, [true; 7]);
    }
}
