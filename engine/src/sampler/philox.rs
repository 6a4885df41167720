//! Random numbers as a function of a counter: Philox4x32-10.
//!
//! Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11. There is no state to carry, so a
//! token's draw is the same wherever and whenever it is made.

/// A number from 0 up to but not 1, for the output token at `position` of a request with `seed`.
pub(super) fn uniform(seed: u64, position: u32) -> f64 {
    let key = [seed as u32, (seed >> 32) as u32];
    let [high, low, _, _] = philox4x32_10([position, 0, 0, 0], key);
    let bits = u64::from(high) << 32 | u64::from(low);
    // The 53 bits that an f64 between 0 and 1 holds exactly.
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if 0 < round {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let [a, b, c, d] = counter;
        let (first, second) = (u64::from(a) * MULTIPLIERS[0], u64::from(c) * MULTIPLIERS[1]);
        counter = [
            (second >> 32) as u32 ^ b ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ d ^ key[1],
            first as u32,
        ];
    }
    counter
}

const ROUNDS: usize = 10;
const MULTIPLIERS: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
/// The golden ratio and the square root of three less one, as fractions of 2^32.
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

#[cfg(test)]
mod tests {
    use super::*;

    /// From `kat_vectors` of the authors' Random123 library.
    #[test]
    fn known_answers() {
        #[rustfmt::skip]
        let rows = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in rows {
            assert_eq!(philox4x32_10(counter, key), expected, "{counter:x?} {key:x?}");
        }
    }

    #[test]
    fn uniform_fills_the_unit_interval_and_depends_on_both_arguments() {
        let draws: Vec<f64> =
            (0..100).flat_map(|seed| (0..1000).map(move |position| uniform(seed, position))).collect();
        let (least, greatest) = draws.iter().fold((1.0f64, 0.0f64), |(a, b), &u| (a.min(u), b.max(u)));
        assert!((0.0..0.001).contains(&least) && (0.999..1.0).contains(&greatest), "{least} {greatest}");
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        // Five times the standard deviation of the mean, which is 1 / sqrt(12 * 100 000).
        assert!((mean - 0.5).abs() < 0.0046, "{mean}");
        assert_ne!(uniform(7, 3), uniform(8, 3));
        assert_ne!(uniform(7, 3), uniform(7 + (1 << 32), 3));
    }
}
