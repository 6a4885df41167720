//! What a draft model may cost that has not gained it.
//!
//! A prompt must be computed by the draft model too before it can guess, and whether its guesses are right is not known
//! before some were made. Both cost time for something that may come to nothing. So they are paid from a purse: a little
//! flows in with each step, and all that guesses gain; when it is empty nothing is tried. Whatever the draft model is worth,
//! serving with it is thus hardly slower than without.

/// Time that may be spent. Empty until the first step has shown what a step takes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Purse(Option<f32>);

impl Purse {
    /// A step was done where one without guesses takes `plain` seconds. It gained so many of those, less what it cost.
    pub(super) fn earn(&mut self, plain: f32, gained: f32) {
        let seconds = self.0.get_or_insert(AT_FIRST * plain);
        *seconds = (*seconds + (SHARE + gained) * plain).min(AT_MOST * plain);
    }

    /// So much was spent.
    pub(super) fn pay(&mut self, seconds: f32) {
        if let Some(left) = &mut self.0 {
            *left -= seconds;
        }
    }

    /// Whether so much can be spent.
    pub(super) fn has(&self, seconds: f32) -> bool {
        self.0.is_some_and(|left| 0.0 < left && seconds <= left)
    }
}

/// Steps' worth that are in it at first: enough to compute a prompt of the usual length.
const AT_FIRST: f32 = 16.0;

/// Share of the time of steps that flows in.
const SHARE: f32 = 0.02;

/// Steps' worth that it holds: no long gain pays for a long loss.
const AT_MOST: f32 = 128.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_spent() {
        /// Steps as (how many, gained by each), then what is spent in seconds, then whether a second can be.
        type Row<'a> = (&'a str, &'a [(u32, f32)], f32, bool);
        #[rustfmt::skip]
        let rows: [Row<'_>; 7] = [
            ("nothing before the first step",            &[],                       0.0,   false),
            ("something after it",                       &[(1, 0.0)],               0.0,   true),
            ("not when it was spent",                    &[(1, 0.0)],               16.0,  false),
            ("a little comes with each step",            &[(100, 0.0)],             16.0,  true),
            ("gains can be spent",                       &[(40, 0.5)],              34.0,  true),
            ("losses cannot",                            &[(40, -0.5)],             0.0,   false),
            ("it does not hold more than so much",       &[(1000, 2.0)],            127.5, false),
        ];
        for (row, steps, spent, expected) in rows {
            let mut purse = Purse::default();
            for (count, gained) in steps {
                (0..*count).for_each(|_| purse.earn(1.0, *gained));
            }
            purse.pay(spent);
            assert_eq!(purse.has(1.0), expected, "{row}: {purse:?}");
        }
    }
}
