//! One row per rule of sampling.

use tidemill_engine_core::request::{SamplingParams, StopConditions};

use super::{History, SampleError, Sampler, logprobs};

/// Draws often enough to see every token that can be chosen, and returns them in rising order.
fn support(logits: &[f32], change: impl FnOnce(&mut SamplingParams)) -> Vec<u32> {
    let mut params = SamplingParams::default();
    change(&mut params);
    let mut sampler = Sampler::new(logits.len());
    let draw = |position| {
        let stop = StopConditions::after(u32::MAX);
        let sampled = sampler.sample(logits, History::default(), &params, &stop, position);
        sampled.expect("there is a token").token
    };
    let mut tokens: Vec<u32> = (0..2000).map(draw).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

/// Logits whose probabilities are these.
fn logits_of(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|probability| probability.ln()).collect()
}

#[test]
fn filters_keep_what_vllm_keeps() {
    let logits = logits_of(&[0.1, 0.4, 0.2, 0.2, 0.1]);
    type Change = fn(&mut SamplingParams);
    #[rustfmt::skip]
    let rows: [(&str, Change, &[u32]); 16] = [
        ("nothing is filtered by default",              |_| {},                                             &[0, 1, 2, 3, 4]),
        ("top-k keeps the most likely",                 |p| p.top_k = Some(1),                              &[1]),
        ("top-k keeps ties of its last",                |p| p.top_k = Some(2),                              &[1, 2, 3]),
        ("a top-k that ends with ties keeps no more",   |p| p.top_k = Some(3),                              &[1, 2, 3]),
        ("top-k beyond the vocabulary keeps all",       |p| p.top_k = Some(1000),                           &[0, 1, 2, 3, 4]),
        ("top-k of zero is off",                        |p| p.top_k = Some(0),                              &[0, 1, 2, 3, 4]),
        ("top-p keeps the token that crosses it",       |p| p.top_p = 0.5,                                  &[1, 2]),
        ("top-p takes ties by rising id",               |p| p.top_p = 0.85,                                 &[0, 1, 2, 3]),
        ("top-p of zero keeps one",                     |p| p.top_p = 0.0,                                  &[1]),
        ("min-p keeps a share of the greatest",         |p| p.min_p = 0.45,                                 &[1, 2, 3]),
        ("min-p of one keeps the greatest",             |p| p.min_p = 1.0,                                  &[1]),
        ("min-p beyond one still keeps the greatest",   |p| p.min_p = 7.0,                                  &[1]),
        ("top-p looks at what top-k kept: 0.5 of 0.8",  |p| (p.top_k, p.top_p) = (Some(3), 0.5),            &[1]),
        ("top-p looks at what min-p kept",              |p| (p.min_p, p.top_p) = (0.45, 0.5),               &[1]),
        ("temperature comes before min-p",              |p| (p.temperature, p.min_p) = (0.5, 0.45),         &[1]),
        ("bias rules a token out",                      |p| p.logit_bias = vec![(1, f32::NEG_INFINITY)],    &[0, 2, 3, 4]),
    ];
    for (name, change, expected) in rows {
        assert_eq!(support(&logits, change), expected, "{name}");
    }
}

#[test]
fn logits_are_adjusted_in_order() {
    let logits = [1.0, 2.0, 3.0, -1.0];
    let (prompt, output) = ([0], [2, 2, 3]);
    type Change = fn(&mut SamplingParams, &mut StopConditions);
    #[rustfmt::skip]
    let rows: [(&str, Change, u32); 11] = [
        ("the greatest wins",                           |_, _| {},                                                          2),
        ("bias changes the greedy choice",              |p, _| p.logit_bias = vec![(3, 5.0)],                               3),
        ("repetition divides positive logits",          |p, _| p.repetition_penalty = 2.0,                                  1),
        ("repetition multiplies negative logits",       |p, _| { p.repetition_penalty = 0.5; p.logit_bias = vec![(2, -9.0), (0, -3.0)] }, 1),
        ("repetition counts the prompt",                |p, _| { p.repetition_penalty = 4.0; p.logit_bias = vec![(0, 3.0)] }, 1),
        ("bias is added before repetition divides",     |p, _| { p.repetition_penalty = 2.0; p.logit_bias = vec![(2, 1.5)] }, 2),
        ("frequency counts occurrences",                |p, _| p.frequency_penalty = 0.6,                                   1),
        ("frequency ignores the prompt",                |p, _| { p.frequency_penalty = 0.9; p.logit_bias = vec![(0, 1.5)] }, 0),
        ("presence counts once",                        |p, _| p.presence_penalty = 0.9,                                    2),
        ("presence ignores the prompt",                 |p, _| { p.presence_penalty = 2.0; p.logit_bias = vec![(0, 1.5)] },  0),
        ("stop tokens wait for min_tokens",             |_, s| { s.min_tokens = 4; s.stop_token_ids = vec![2, 999] },       1),
    ];
    for (name, change, expected) in rows {
        let (mut params, mut stop) = (greedy(), StopConditions::after(9));
        change(&mut params, &mut stop);
        let history = History { prompt: &prompt, output: &output };
        let mut sampler = Sampler::new(logits.len());
        for pass in 0..2 {
            let sampled = sampler.sample(&logits, history, &params, &stop, 3).unwrap();
            assert_eq!(sampled.token, expected, "{name}, pass {pass}");
        }
    }
}

#[test]
fn end_of_sequence_waits_for_min_tokens_unless_ignored() {
    let choose = |min_tokens, ignore_eos| {
        let eos =
            StopConditions { min_tokens, ignore_eos, eos_token_ids: vec![0], ..StopConditions::after(9) };
        Sampler::new(2).sample(&[2.0, 1.0], History::default(), &greedy(), &eos, 3).unwrap().token
    };
    assert_eq!(choose(3, false), 0, "the fourth token may end the text when three are the minimum");
    assert_eq!(choose(4, false), 1, "it may not when four are");
    assert_eq!(choose(4, true), 0, "a token that ends nothing is never masked");
}

#[test]
fn the_draw_depends_on_seed_and_position_alone() {
    let logits: Vec<f32> = (0..500).map(|token| ((token * 37) % 101) as f32 / 20.0).collect();
    let draw = |sampler: &mut Sampler, seed, position| {
        let params = SamplingParams { seed, ..SamplingParams::default() };
        let stop = StopConditions::after(9);
        sampler.sample(&logits, History::default(), &params, &stop, position).unwrap().token
    };
    let mut used = Sampler::new(logits.len());
    let rising: Vec<u32> = (0..50).map(|position| draw(&mut used, 1, position)).collect();
    let falling: Vec<u32> =
        (0..50).rev().map(|position| draw(&mut Sampler::new(logits.len()), 1, position)).collect();
    assert!(rising.iter().eq(falling.iter().rev()));
    let other: Vec<u32> = (0..50).map(|position| draw(&mut used, 2, position)).collect();
    assert_ne!(rising, other);
}

/// Draws from a large vocabulary, so that the order is sorted in several steps, and compares with a full sort.
#[test]
fn sorting_in_steps_chooses_what_a_full_sort_chooses() {
    let logits: Vec<f32> = (0..3000).map(|token| ((token * 7919) % 1009) as f32 / 500.0).collect();
    let mut order: Vec<u32> = (0..3000).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    let weights: Vec<f64> = order.iter().map(|token| f64::from(logits[*token as usize]).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut sampler = Sampler::new(logits.len());
    for position in 0..300 {
        let target = super::philox::uniform(5, position) * total;
        let mut sum = 0.0;
        let place = weights.iter().position(|weight| {
            sum += weight;
            target < sum
        });
        let params = SamplingParams { seed: 5, ..SamplingParams::default() };
        let stop = StopConditions::after(9);
        let sampled = sampler.sample(&logits, History::default(), &params, &stop, position).unwrap();
        assert_eq!(Some(sampled.token), place.map(|place| order[place]), "position {position}");
    }
}

#[test]
fn frequencies_follow_the_probabilities() {
    let probabilities = [0.05, 0.3, 0.15, 0.1, 0.02, 0.2, 0.08, 0.1];
    let logits: Vec<f32> =
        probabilities.iter().map(|probability: &f32| 2.0 * probability.ln() + 3.0).collect();
    // Twice the logarithm at temperature two: the same distribution, if temperature divides.
    let params = SamplingParams { temperature: 2.0, seed: 20, ..SamplingParams::default() };
    let stop = StopConditions::after(9);
    let mut sampler = Sampler::new(logits.len());
    let draws = 40_000;
    let mut counts = [0u32; 8];
    for position in 0..draws {
        let sampled = sampler.sample(&logits, History::default(), &params, &stop, position).unwrap();
        counts[sampled.token as usize] += 1;
    }
    let chi_square: f64 = counts
        .iter()
        .zip(probabilities)
        .map(|(&count, probability)| {
            let expected = f64::from(draws) * f64::from(probability);
            (f64::from(count) - expected).powi(2) / expected
        })
        .sum();
    // Seven degrees of freedom exceed 24.3 once in a thousand seeds; this seed is one of the others.
    assert!(chi_square < 24.3, "{chi_square} from {counts:?}");
}

#[test]
fn logprobs_are_of_the_untouched_logits() {
    let logits = logits_of(&[0.1, 0.4, 0.2, 0.2, 0.1]);
    let params = SamplingParams {
        temperature: 0.0,
        logprobs: Some(3),
        logit_bias: vec![(3, 10.0)],
        ..SamplingParams::default()
    };
    let stop = StopConditions::after(9);
    let sampled = Sampler::new(5).sample(&logits, History::default(), &params, &stop, 0).unwrap();
    assert_eq!(sampled.token, 3);
    let found = sampled.logprobs.expect("asked for");
    assert!((found.chosen - 0.2f32.ln()).abs() < 1e-6, "{found:?}");
    assert_eq!(found.rank, 3, "both of the two equal tokens count, and the one above");
    assert_eq!(found.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 2, 3]);
    assert!((found.top[0].1 - 0.4f32.ln()).abs() < 1e-6, "{found:?}");

    assert_eq!(logprobs(&logits, 0, 0).unwrap().top, []);
    assert_eq!(logprobs(&logits, 0, 99).unwrap().top.len(), 5);
}

#[test]
fn hopeless_logits_are_errors() {
    let unknown = SampleError::UnknownToken { token: 7, vocab_size: 2 };
    let bias = |token, bias| vec![(token, bias)];
    let infinity = f32::INFINITY;
    #[rustfmt::skip]
    let rows = [
        ("not a number",                [1.0, f32::NAN],        vec![],                 SampleError::NotFinite),
        ("infinite",                    [1.0, infinity],        vec![],                 SampleError::NotFinite),
        ("made infinite by the bias",   [1.0, 2.0],             bias(0, infinity),      SampleError::NotFinite),
        ("nothing left",                [-infinity, 1.0],       bias(1, -infinity),     SampleError::NothingLeft),
        ("a token that is not there",   [1.0, 2.0],             bias(7, 1.0),           unknown),
    ];
    for (name, logits, logit_bias, expected) in rows {
        for temperature in [0.0, 1.0] {
            let params =
                SamplingParams { temperature, logit_bias: logit_bias.clone(), ..SamplingParams::default() };
            let stop = StopConditions::after(9);
            let found = Sampler::new(2).sample(&logits, History::default(), &params, &stop, 0);
            assert_eq!(found, Err(expected.clone()), "{name} at temperature {temperature}");
        }
    }
    assert_eq!(logprobs(&[1.0, f32::NAN], 0, 1), Err(SampleError::NotFinite));
    assert!(matches!(logprobs(&[1.0, 2.0], 7, 1), Err(SampleError::UnknownToken { token: 7, .. })));
}

#[test]
fn the_first_of_the_greatest_is_found_wherever_it_is() {
    for vocab_size in [1, 2, 31, 32, 33, 255, 256, 257, 1000] {
        for place in
            [0, 1, 30, 31, 32, 254, 255, 256, 511, 512, 999].into_iter().filter(|it| *it < vocab_size)
        {
            let mut logits: Vec<f32> = (0..vocab_size).map(|token| -1.0 - (token % 7) as f32).collect();
            logits[place..].iter_mut().step_by(97).for_each(|logit| *logit = -0.5);
            assert_eq!(super::choice::greedy(&logits) as usize, place, "of {vocab_size}");
            logits[..place].fill(f32::NEG_INFINITY);
            assert_eq!(
                super::choice::greedy(&logits) as usize,
                place,
                "of {vocab_size}, behind those ruled out"
            );
        }
    }
    assert_eq!(super::choice::greedy(&[-1.0, -0.0, 0.0]), 1, "both zeros are alike");
    assert_eq!(super::choice::greedy(&[f32::NEG_INFINITY; 40]), 0);
}
