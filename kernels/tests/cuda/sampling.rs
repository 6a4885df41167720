//! The choice of tokens, against a sampler that sorts; the sampler of the CPU, which lives above, is not compared yet.

use super::{
    on_devices,
    support::{Numbers, cuda::Buffer},
};
use tidemill_kernels::{
    cuda::{Driver, LikelyToken, LogprobsOfRows, LogprobsRow, LogprobsSum, Sample, SampleRow, launches},
    reference,
};

/// Rows of logits in, tokens out.
fn sample(device: &dyn Driver, logits: &[f32], rows: &[SampleRow]) -> Vec<u32> {
    let vocabulary = logits.len() / rows.len();
    let (on_device, parameters) = (Buffer::new(device, logits), Buffer::new(device, rows));
    let tokens = Buffer::empty(device, size_of_val(rows) / size_of::<SampleRow>() * size_of::<u32>());
    let weights = Buffer::empty(device, logits.len() * size_of::<u64>());
    let parameters = Sample {
        tokens: tokens.address(),
        logits: on_device.address(),
        weights: weights.address(),
        rows: parameters.address(),
        vocabulary: vocabulary as u32,
        reserved: 0,
    };
    device.launch(&launches::sample(rows.len() as u32, &parameters)).expect("kernels run");
    tokens.read()
}

/// Tokens by falling weight, equal ones by rising id, down to the last that the row keeps.
fn kept(logits: &[f32], row: &SampleRow) -> Vec<(usize, f64)> {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: &f32| (f64::from(logit - greatest) / f64::from(row.temperature)).exp();
    let mut order: Vec<(usize, f64)> = logits.iter().map(weight).enumerate().collect();
    order.retain(|(_, weight)| f64::from(row.min_p) <= *weight && 0.0 < *weight);
    order.sort_by(|(a, x), (b, y)| y.total_cmp(x).then(a.cmp(b)));
    if 0 < row.top_k && (row.top_k as usize) < order.len() {
        let least = order[row.top_k as usize - 1].1;
        order.retain(|(_, weight)| least <= *weight);
    }
    let share = f64::from(row.top_p) * order.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    let enough = order.iter().position(|(_, weight)| {
        sum += weight;
        share <= sum
    });
    if row.top_p < 1.0 {
        order.truncate(enough.map_or(order.len(), |last| last + 1));
    }
    order
}

#[test]
fn greedy() {
    on_devices(|device| {
        for vocabulary in [1, 2, 511, 512, 513, 5000] {
            let mut numbers = Numbers::new(40);
            let mut logits = numbers.vector(3 * vocabulary);
            // Equal ones: the first is taken.
            logits[2 * vocabulary..].fill(-3.0);
            logits[..vocabulary / 2].fill(f32::NEG_INFINITY);
            let expected: Vec<u32> = logits
                .chunks(vocabulary)
                .map(|row| reference::argmax(row).expect("numbers") as u32)
                .collect();
            assert_eq!(sample(device, &logits, &[SampleRow::default(); 3]), expected, "{vocabulary}");
        }
    });
}

#[test]
fn rows_without_a_choice() {
    on_devices(|device| {
        for temperature in [0.0, 1.0] {
            let row = SampleRow { temperature, top_p: 1.0, ..SampleRow::default() };
            let mut logits = vec![0.5; 5 * 700];
            logits[3] = f32::NAN;
            logits[700 + 699] = f32::INFINITY;
            logits[1400..2100].fill(f32::NEG_INFINITY);
            logits[2100..2800].fill(f32::NEG_INFINITY);
            logits[2100 + 650] = -1e30;
            let tokens = sample(device, &logits, &[row; 5]);
            let expected = [Sample::NOT_FINITE, Sample::NOT_FINITE, Sample::NOTHING_LEFT, 650];
            assert_eq!(tokens[..4], expected, "temperature {temperature}");
            assert!(tokens[4] < 700, "{tokens:?}");
        }
    });
}

#[test]
fn draws_are_those_of_a_sorted_list() {
    on_devices(|device| {
        for vocabulary in [1, 40, 1500] {
            let mut numbers = Numbers::new(41);
            let mut logits: Vec<f32> = numbers.vector(vocabulary).iter().map(|x| 8.0 * x).collect();
            // Equal ones, also at the ends of what is kept.
            for logit in &mut logits[..vocabulary / 3] {
                *logit = (*logit * 2.0).round() / 2.0;
            }
            let all = SampleRow { temperature: 1.0, top_p: 1.0, ..SampleRow::default() };
            let ways = [
                ("all", all),
                ("cold", SampleRow { temperature: 0.05, ..all }),
                ("hot", SampleRow { temperature: 100.0, ..all }),
                ("top-k", SampleRow { top_k: 7, ..all }),
                ("one", SampleRow { top_k: 1, ..all }),
                ("top-p", SampleRow { top_p: 0.9, ..all }),
                ("a little of the mass", SampleRow { top_p: 1e-6, ..all }),
                ("min-p", SampleRow { min_p: 0.02, ..all }),
                ("all of the least", SampleRow { min_p: 1.0, ..all }),
                ("everything", SampleRow { temperature: 1.7, top_k: 50, top_p: 0.8, min_p: 0.01, ..all }),
            ];
            for (name, way) in ways {
                let rows: Vec<SampleRow> = (0..4)
                    .map(|index| SampleRow { seed: numbers.bits(), position: 1000 * index, ..way })
                    .collect();
                let tokens = sample(device, &logits.repeat(rows.len()), &rows);
                let order = kept(&logits, &way);
                let total: f64 = order.iter().map(|(_, weight)| weight).sum();
                for (row, token) in rows.iter().zip(tokens) {
                    let mut sum = 0.0;
                    let target = uniform(row.seed, row.position) * total;
                    let expected = order.iter().find(|(_, weight)| {
                        sum += weight;
                        target < sum
                    });
                    let expected = expected.expect("a share below one is passed").0;
                    assert_eq!(token as usize, expected, "{vocabulary}, {name}, {row:?}");
                }
            }
        }
    });
}

/// Rows of logits and the tokens that were chosen in; sums and likely tokens out, those of rows that are left out too.
fn logprobs(
    device: &dyn Driver,
    logits: &[f32],
    rows: &[LogprobsRow],
    chosen: &[u32],
    places: usize,
) -> (Vec<LogprobsSum>, Vec<LikelyToken>) {
    let (on_device, wanted) = (Buffer::new(device, logits), Buffer::new(device, rows));
    let chosen = Buffer::new(device, chosen);
    let sums = Buffer::new(device, &vec![LogprobsSum { total: -1.0, ..LogprobsSum::default() }; rows.len()]);
    let likely = Buffer::new(device, &vec![UNTOUCHED; (rows.len() * places).max(1)]);
    let weights = Buffer::empty(device, logits.len() * size_of::<u64>());
    let parameters = LogprobsOfRows {
        sums: sums.address(),
        likely: likely.address(),
        logits: on_device.address(),
        weights: weights.address(),
        rows: wanted.address(),
        chosen: chosen.address(),
        vocabulary: (logits.len() / rows.len()) as u32,
        places: places as u32,
    };
    device.launch(&launches::logprobs(rows.len() as u32, &parameters)).expect("kernels run");
    (sums.read(), likely.read())
}

const UNTOUCHED: LikelyToken = LikelyToken { token: 77, logit: -77.0 };

#[test]
fn log_probabilities_are_those_of_a_sorted_list() {
    on_devices(|device| {
        for vocabulary in [1, 5, 511, 512, 513, 5000] {
            let mut numbers = Numbers::new(42);
            let mut row: Vec<f32> = numbers.vector(vocabulary).iter().map(|x| 4.0 * x).collect();
            // Equal ones, both zeros and tokens that are ruled out among them.
            for (index, logit) in row.iter_mut().enumerate().filter(|(index, _)| index % 3 == 0) {
                *logit = match index % 4 {
                    0 => (*logit * 2.0).round() / 2.0,
                    1 => 0.0,
                    2 => -0.0,
                    _ => f32::NEG_INFINITY,
                };
            }
            row[vocabulary / 2] = 3.0;
            let mut order: Vec<usize> = (0..vocabulary).collect();
            order.sort_by(|a, b| row[*b].partial_cmp(&row[*a]).expect("numbers").then(a.cmp(b)));
            let greatest = row[order[0]];
            let total: f64 = row.iter().map(|logit| f64::from(logit - greatest).exp()).sum();
            let (token, chosen) = ((vocabulary - 1) as u32, (vocabulary / 2) as u32);
            for count in [0, 1, 2, 20, LogprobsRow::MOST] {
                let places = 1 + count.min(LogprobsRow::MOST - 1) as usize;
                let of_token = LogprobsRow { token, count };
                let of_chosen = LogprobsRow { token: LogprobsRow::CHOSEN, count };
                let rows = [of_token, LogprobsRow::LEFT_OUT, of_chosen];
                let (sums, likely) = logprobs(device, &row.repeat(3), &rows, &[u32::MAX, 0, chosen], places);
                assert_eq!(sums[1].total, -1.0, "{vocabulary}: a row that is left out stays as it was");
                assert_eq!(likely[places..2 * places], vec![UNTOUCHED; places], "{vocabulary}");
                for (index, token) in [(0, token), (2, chosen)] {
                    let logit = row[token as usize];
                    let rank = row.iter().filter(|other| logit <= **other).count() as u32;
                    let found = sums[index];
                    assert_eq!(
                        (found.greatest, found.chosen, found.rank),
                        (greatest, logit, rank),
                        "{vocabulary}"
                    );
                    assert!((found.total / total - 1.0).abs() < 1e-13, "{vocabulary}: {found:?}, {total}");
                    let wanted = vocabulary.min(count as usize);
                    let likely = &likely[index * places..][..wanted];
                    for (place, (found, &expected)) in likely.iter().zip(&order).enumerate() {
                        let expected = (expected as u32, row[expected].to_bits());
                        assert_eq!(
                            (found.token, found.logit.to_bits()),
                            expected,
                            "{vocabulary}, {count}: {place}"
                        );
                    }
                }
            }
        }
    });
}

/// Nothing of such a row is of use, and none of it is looked at.
#[test]
fn log_probabilities_of_no_numbers_have_no_sum() {
    on_devices(|device| {
        let mut logits = vec![0.5; 4 * 700];
        logits[3] = f32::NAN;
        logits[700 + 699] = f32::INFINITY;
        logits[1400..2100].fill(f32::NEG_INFINITY);
        let rows = [LogprobsRow { token: 3, count: 4 }; 4];
        let (sums, _) = logprobs(device, &logits, &rows, &[Sample::NOT_FINITE; 4], 4);
        let finite: Vec<bool> = sums.iter().map(|sum| sum.total.is_finite()).collect();
        assert_eq!(finite, [false, false, false, true], "{sums:?}");
    });
}

/// Philox4x32-10 in the words of its paper.
fn uniform(seed: u64, position: u32) -> f64 {
    let mut counter = [position, 0, 0, 0];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let product = |word: u32, by: u64| u64::from(word) * by;
        let (x, y) = (product(counter[0], 0xd251_1f53), product(counter[2], 0xcd9e_8d57));
        counter = [
            (y >> 32) as u32 ^ counter[1] ^ key[0],
            y as u32,
            (x >> 32) as u32 ^ counter[3] ^ key[1],
            x as u32,
        ];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    ((u64::from(counter[0]) << 32 | u64::from(counter[1])) >> 11) as f64 / (1u64 << 53) as f64
}
