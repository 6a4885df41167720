//! Which parts of a piece of memory are in use: the first that is long enough is given out, and neighbours that have come
//! back are one again.

use std::collections::BTreeMap;

/// Offsets into some memory, free and given out.
#[derive(Clone, Debug)]
pub struct Extents {
    len: usize,
    /// By offset, how long each free part is. No two of them touch.
    free: BTreeMap<usize, usize>,
}

impl Extents {
    /// All of `len` bytes are free.
    pub fn new(len: usize) -> Self {
        let free = if len == 0 { BTreeMap::new() } else { BTreeMap::from([(0, len)]) };
        Self { len, free }
    }

    /// Offset of `len` bytes that nobody else has; `None` when no part is that long.
    ///
    /// # Panics
    ///
    /// When `len` is zero: a bug.
    pub fn take(&mut self, len: usize) -> Option<usize> {
        assert!(0 < len, "nobody needs no bytes");
        let (&start, &found) = self.free.iter().find(|(_, found)| len <= **found)?;
        self.free.remove(&start);
        if len < found {
            self.free.insert(start + len, found - len);
        }
        Some(start)
    }

    /// Takes back what [`take`](Self::take) gave out, all of it at once.
    ///
    /// # Panics
    ///
    /// When some of it is free already, or outside: a bug.
    pub fn give_back(&mut self, start: usize, len: usize) {
        let end = start.checked_add(len).filter(|&end| end <= self.len).expect("it was given out from here");
        let before = self.free.range(..end).next_back().map(|(&start, &len)| (start, len));
        assert!(before.is_none_or(|(at, len)| at + len <= start), "{start}..{end} is free already");
        let mut joined = (start, len);
        if let Some((at, before)) = before.filter(|(at, len)| at + len == start) {
            joined = (at, before + len);
        }
        if let Some(behind) = self.free.remove(&end) {
            joined.1 += behind;
        }
        self.free.insert(joined.0, joined.1);
    }

    /// How long the longest free part is.
    pub fn longest(&self) -> usize {
        self.free.values().copied().max().unwrap_or(0)
    }

    /// Whether all of it is free.
    pub fn is_whole(&self) -> bool {
        self.free.values().sum::<usize>() == self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `+n` takes, `-a..b` gives back; what is said is where the taken parts are, and what is free at the end.
    #[test]
    fn parts_are_given_out_and_come_back() {
        #[rustfmt::skip]
        let rows = [
            ("one after the other",                   "+10 +20",                         "0 10",         "30..100"),
            ("up to the last byte",                   "+60 +40",                         "0 60",         ""),
            ("and no further",                        "+60 +41",                         "0 -",          "60..100"),
            ("the first that is long enough",         "+10 +10 +10 -0..10 -20..30 +8",   "0 10 20 0",    "8..10 20..100"),
            ("a hole that is too short is left",      "+10 +10 -0..10 +11",              "0 10 20",      "0..10 31..100"),
            ("neighbours are one again",              "+10 +10 +10 -0..10 -20..30 -10..20", "0 10 20",   "0..100"),
            ("… before what is in use",               "+10 +10 +10 -0..10 -10..20",      "0 10 20",      "0..20 30..100"),
        ];
        for (name, story, taken, free) in rows {
            let mut extents = Extents::new(100);
            let mut given = Vec::new();
            for word in story.split(' ') {
                if let Some(len) = word.strip_prefix('+') {
                    let start = extents.take(len.parse().unwrap());
                    given.push(start.map_or("-".to_owned(), |it| it.to_string()));
                } else {
                    let (start, end) = word[1..].split_once("..").unwrap();
                    let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
                    extents.give_back(start, end - start);
                }
            }
            let found: Vec<String> =
                extents.free.iter().map(|(start, len)| format!("{start}..{}", start + len)).collect();
            assert_eq!((given.join(" "), found.join(" ")), (taken.to_owned(), free.to_owned()), "{name}");
            let longest = extents.free.values().copied().max().unwrap_or(0);
            assert_eq!((extents.longest(), extents.is_whole()), (longest, free == "0..100"), "{name}");
        }
        assert_eq!(Extents::new(0).take(1), None);
    }

    #[test]
    #[should_panic(expected = "is free already")]
    fn nothing_comes_back_twice() {
        let mut extents = Extents::new(100);
        extents.take(50);
        extents.give_back(0, 50);
        extents.give_back(10, 20);
    }
}
