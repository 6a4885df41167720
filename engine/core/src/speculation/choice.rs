//! How many guesses each sequence gets.
//!
//! A guess lengthens the step for everybody and brings its own sequence forward, if it is right. What is made small is the
//! sum, over the sequences, of the time that each waits per token: so a sequence with sure guesses does not hold up many
//! that have none. With one sequence this is simply the most tokens per second.

use super::costs::CostCurve;

/// Numbers of guesses, one for each element of `chances`, which has for each guess of a sequence in order the chance that
/// it and all before it are right. `others` is how many sequences of the step have no guesses.
pub(super) fn choose(chances: &[&[f32]], others: usize, costs: &CostCurve) -> Vec<usize> {
    let mut tokens = vec![1.0_f32; chances.len()];
    let mut taken = vec![0_usize; chances.len()];
    let mut waits = (chances.len() + others) as f32;
    let mut best = (waits * WORTH_IT, 0);
    // The sequences in the order in which their next guess helps most.
    let mut order = Vec::new();
    for drafted in 1..=costs.reach() {
        let saved = |place: &usize| {
            let more = chances[*place].get(taken[*place])?;
            Some(1.0 / tokens[*place] - 1.0 / (tokens[*place] + more))
        };
        let candidates = (0..chances.len()).filter_map(|place| Some((place, saved(&place)?)));
        let Some((place, saved)) = candidates.reduce(|best, it| if best.1 < it.1 { it } else { best }) else {
            break;
        };
        tokens[place] += chances[place][taken[place]];
        taken[place] += 1;
        order.push(place);
        waits -= saved;
        let total = costs.at(drafted) * waits;
        if total < best.0 {
            best = (total, order.len());
        }
    }
    let mut chosen = vec![0; chances.len()];
    order[..best.1].iter().for_each(|place| chosen[*place] += 1);
    chosen
}

/// What drafts must bring the waiting down to: less would be lost in what they cost beside the step.
pub(super) const WORTH_IT: f32 = 0.97;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::costs::StepCosts;
    use super::*;

    /// A step takes 100, and for drafted tokens what the second list says.
    fn costs(sequences: u32, drafted: &[(u32, u64)]) -> CostCurve {
        let mut costs = StepCosts::default();
        (0..3).for_each(|_| costs.record(sequences, 0, Duration::from_millis(100)));
        for (number, took) in drafted {
            costs.record(sequences, *number, Duration::from_millis(*took));
        }
        costs.curve(sequences).unwrap()
    }

    #[test]
    fn choices() {
        const FREE: &[(u32, u64)] = &[(8, 100)];
        const DEAR: &[(u32, u64)] = &[(1, 200), (8, 900)];
        const SOME: &[(u32, u64)] = &[(1, 110), (8, 180)];
        const STAIRS: &[(u32, u64)] = &[(1, 150), (3, 150), (4, 400), (8, 400)];
        let sure = |count: usize| vec![0.99_f32; count];
        let fading = |chance: f32| (1..=8).map(|power| chance.powi(power)).collect::<Vec<f32>>();
        type Row<'a> = (&'a str, Vec<Vec<f32>>, usize, &'a [(u32, u64)], Vec<usize>);
        #[rustfmt::skip]
        let rows: [Row<'_>; 11] = [
            ("nothing to guess",                               vec![],                         3, FREE,   vec![]),
            ("free guesses are all taken",                     vec![fading(0.5)],              0, FREE,   vec![8]),
            ("guesses as dear as steps are not",               vec![sure(8)],                  0, DEAR,   vec![0]),
            ("good guesses are worth something",               vec![sure(8)],                  0, SOME,   vec![8]),
            ("guesses that fade are cut where they cost more", vec![fading(0.6)],              0, SOME,   vec![3]),
            ("bad ones are not made",                          vec![fading(0.1)],              0, SOME,   vec![0]),
            ("a step of the stairs is filled",                 vec![fading(0.7)],              0, STAIRS, vec![3]),
            ("a hopeless one is hardly held up by a sure one", vec![fading(0.01), sure(8)],    0, SOME,   vec![0, 2]),
            ("two share what is free",                         vec![sure(2), sure(4)],         0, FREE,   vec![2, 4]),
            ("one does not hold up many",                      vec![sure(8)],                  20, SOME,  vec![0]),
            ("unmeasured ground is entered in small steps",    vec![sure(8)],                  0, &[],    vec![2]),
        ];
        for (row, chances, others, drafted, expected) in rows {
            let sequences = u32::try_from(chances.len() + others).unwrap();
            let chances: Vec<&[f32]> = chances.iter().map(Vec::as_slice).collect();
            assert_eq!(choose(&chances, others, &costs(sequences, drafted)), expected, "{row}");
        }
    }
}
